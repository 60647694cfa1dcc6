"""EASE: expandable subspace ensemble (Zhou et al., CVPR 2024, arXiv 2403.12030)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.classifier import ClassCounts
from inflora.data.tasks import Task, class_to_task
from inflora.parts import adapters
from inflora.parts.adapter_sets import AdapterSetMethod
from inflora.parts.class_statistics import GrowingBuffers
from inflora.parts.prototypes import CosineClassifier, class_means, cosine


class EASE(AdapterSetMethod):
    """One set of adapters per task, each a subspace of its own; class means in all of them classify.

    A fresh set trains on every task with a temporary cosine classifier. The means of the new classes are taken in all subspaces so far; the
    means of old classes in later subspaces, whose images are gone, are combinations of the classes that were seen there, weighted by their
    similarity in the old class's own subspace. A class's score is the cosine in its own subspace plus alpha / t times the sum of the
    others', t + 1 being the number of subspaces.

    Official code: github.com/sun-hailong/CVPR24-Ease, also in LAMDA-PILOT (the same; both assume tasks of equal size, we do not). Loss:
    cross-entropy over the current task's classes, which for a task of one class is zero: its adapters stay as they started. Not here: their
    options for the pretrained features as a further subspace.

    Trains per task L * (2 * D * bottleneck + bottleneck + D) floats (L blocks, D = embed_dim) and the temporary classifier. Stores those
    adapters of every task, and a mean of D floats for every class in every subspace: with C classes after T tasks, C * T * D. An image
    takes a pass through the backbone for every task.

    Args:
        backbone: a timm vision transformer without head.
        bottleneck: width of an adapter.
        adapter_scale: factor of its output.
        dropout: inside an adapter.
        alpha: weight of the other subspaces.

    Raises:
        ValueError: if an argument does not fit the backbone.
    """

    def __init__(self, backbone: Any, *, bottleneck: int, adapter_scale: float, dropout: float, alpha: float) -> None:
        super().__init__(backbone, bottleneck=bottleneck, adapter_scale=adapter_scale, dropout=dropout)
        if alpha < 0:
            raise ValueError(f"method.alpha={alpha} is negative; choose 0 (its own subspace alone) or more")
        self.alpha = alpha
        self.heads = ClassCounts(self.heads.embed_dim)
        self.classifier: CosineClassifier | None = None
        self.prototypes = SubspacePrototypes(self.heads.embed_dim)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.add_set()
        self.classifier = self._make_classifier()

    def _make_classifier(self) -> CosineClassifier:
        return CosineClassifier(self.heads.embed_dim, self.heads.sizes[-1]).to(self.device)

    def param_groups(self) -> list[dict[str, Any]]:
        assert self.classifier is not None
        return self.branch_and_head(self.classifier)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.classifier is not None
        scores, y = self.classifier(self.features(x)), y - self.num_old_classes
        self.observe(scores, y)
        return F.cross_entropy(scores, y)

    def subspace_features(self, x: Tensor, num_subspaces: int) -> Tensor:
        """Class tokens with each of the first sets of adapters: (B, num_subspaces, embed_dim)."""
        features = []
        for index in range(num_subspaces):
            with adapters.active(self.backbone, index):
                features.append(self.features(x))
        return torch.stack(features, dim=1)

    def end_task(self, task: Task) -> None:
        self.classifier = None
        num_subspaces = len(self.heads)
        width = num_subspaces * self.heads.embed_dim
        means = class_means(lambda x: self.subspace_features(x, num_subspaces).flatten(1), task, width, self.device)
        self.prototypes.add(means.unflatten(1, (num_subspaces, -1)))
        self.prototypes.complete(self.heads.sizes)

    def predict(self, x: Tensor) -> Tensor:
        num_subspaces = self.prototypes.means.shape[1]  # in the middle of a task, one less than there are
        features = self.subspace_features(x, num_subspaces)
        cosines = [cosine(features[:, j], self.prototypes.means[:, j]) for j in range(num_subspaces)]
        own = class_to_task(self.heads.sizes[:num_subspaces], x.device)
        others = self.alpha / max(num_subspaces - 1, 1)
        return sum(scores * torch.where(own == j, 1.0, others) for j, scores in enumerate(cosines))  # type: ignore[return-value]

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "has_classifier": self.classifier is not None}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.classifier = self._make_classifier() if state["has_classifier"] else None


class SubspacePrototypes(GrowingBuffers):
    """The mean of every class in every subspace: seen where the subspace is of the class's task or an earlier one, else put together.

    Attributes:
        means: (classes, subspaces, dim), not normalised.
    """

    means: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, 0, dim))

    def add(self, means: Tensor) -> None:
        """Append (classes, subspaces, dim) means of a task that brought one subspace; the old classes get zeros there."""
        old = F.pad(self.means, (0, 0, 0, means.shape[1] - self.means.shape[1]))
        self.means = torch.cat([old, means.to(self.means)])

    def complete(self, sizes: list[int]) -> None:
        """Fill in the means of each class in the subspaces of later tasks, always from seen ones.

        With i the class's task and j > i: mean[o, j] = sum_c w_c mean[c, j] over the classes c of the tasks from j on, w the softmax of
        cos(mean[o, i], mean[c, i]).

        Args:
            sizes: classes of each task.
        """
        means = self.means.clone()
        classes = list(torch.arange(sum(sizes)).split(sizes))
        for i, old in enumerate(classes):
            for j in range(i + 1, len(sizes)):
                seen = torch.cat(classes[j:])
                weights = cosine(means[old, i], means[seen, i]).softmax(dim=1)
                with torch.autocast(means.device.type, enabled=False):
                    means[old, j] = weights @ means[seen, j]
        self.means = means
