"""MOS: model surgery (Sun et al., AAAI 2025, arXiv 2412.09441)."""

from typing import Any

import torch
from torch import Tensor

from inflora.data.tasks import Task, class_to_task
from inflora.parts import adapters
from inflora.parts.adapter_sets import AdapterSetMethod
from inflora.parts.classifier_alignment import ClassifierAlignment
from inflora.parts.contrast import contrastive
from inflora.parts.prototypes import Prototypes, class_means


class MOS(AdapterSetMethod):
    """A set of adapters per task, pulled towards the older ones while it trains; an image's own predictions find the set that suits it.

    Each task's adapters start as the last task's; after every step they become (1 - momentum) times themselves plus momentum times the mean
    of the older tasks' adapters. All heads are then trained on samples from the classes' Gaussians. Retrieval: class means under the first
    task's adapters name a first class, whose task's adapters and the heads name the next, and so on until a task names itself, or for
    `retrieval_steps` passes. A score is the sum of the heads' probabilities under the set found and of those of the class means, their
    cosines multiplied by the number of tasks.

    Loss: cross-entropy over the current task's classes plus `contrast` times a cross-entropy that tells the features of a batch (of one
    process) and the means of the older classes apart.

    Trains per task L * (2 * D * bottleneck + bottleneck + D) floats (L blocks, D = embed_dim) and the current head. Stores that for every
    task, and per class D^2 + 2 * D floats of Gaussian and mean. An image takes a pass through the backbone per task.

    Official code: github.com/sun-hailong/AAAI25-MOS, also in LAMDA-PILOT. There the merging is applied not only after each step, as in the
    paper, but also in every forward pass, once per block, and in place: in training (momentum = 0.75 here comes near it), and when
    statistics are taken and images tested, so that a score depends on the batches before it. Here only steps merge. There dropout is on
    when the class means of later tasks are taken, and old heads decay while a task trains; not here. Heads start there with a standard
    deviation of 0.02 and no bias, here as torch's linear layers do.

    Args:
        backbone: a timm vision transformer without head.
        bottleneck, adapter_scale, dropout: of an adapter.
        momentum: of the merging, in [0, 1].
        contrast: weight of the second loss.
        retrieval_steps: passes of an image from one set to the next, at most.
        alignment: of the heads; see `ClassifierAlignment`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        bottleneck: int,
        adapter_scale: float,
        dropout: float,
        momentum: float,
        contrast: float,
        retrieval_steps: int,
        alignment: dict[str, Any],
    ) -> None:
        super().__init__(backbone, bottleneck=bottleneck, adapter_scale=adapter_scale, dropout=dropout)
        if not 0 <= momentum <= 1:
            raise ValueError(f"method.momentum={momentum} is out of range; choose 0..1")
        if contrast < 0:
            raise ValueError(f"method.contrast={contrast} is negative; choose 0 or more")
        if retrieval_steps < 1:
            raise ValueError(f"method.retrieval_steps={retrieval_steps} is below 1; choose 1 or more")
        self.momentum, self.contrast, self.retrieval_steps = momentum, contrast, retrieval_steps
        self.alignment = ClassifierAlignment(
            self.heads.embed_dim, temperature=None, mean_scale=1.0, restore=False, key="method.alignment", **alignment
        )
        self.prototypes = Prototypes(self.heads.embed_dim)
        self._older: list[Tensor] | None = None

    @property
    def older_mean(self) -> list[Tensor]:
        """The mean over the older tasks of each of `set_parameters`; computed once a task, when it is first needed."""
        if self._older is None:
            older = zip(*(self.set_parameters(task) for task in range(len(self.heads) - 1)), strict=True)
            self._older = [torch.stack(values).mean(0).detach() for values in older]
        return self._older

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._older = None
        self.add_set(copied_from=self.num_sets - 1 if self.num_sets else None)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.branch_and_head(self.heads.current)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.features(x)
        return self.local_cross_entropy(features, y) + self.contrast * contrastive(features, self.alignment.statistics.means)

    @torch.no_grad()
    def after_step(self) -> None:
        if len(self.heads) > 1 and self.momentum:
            for parameter, mean in zip(self.set_parameters(len(self.heads) - 1), self.older_mean, strict=True):
                parameter.lerp_(mean, self.momentum)

    def end_task(self, task: Task) -> None:
        self.alignment.statistics.add(task, self.features)
        if len(self.heads) > 1:
            self.alignment.align(self.heads)
        self.prototypes.add(class_means(lambda x: self.set_features(x, 0), task, self.heads.embed_dim, self.device))

    def set_features(self, x: Tensor, task: int) -> Tensor:
        """(B, embed_dim) under a task's adapters."""
        with adapters.active(self.backbone, task):
            return self.features(x)

    @property
    def num_learned(self) -> int:
        """Tasks that have ended; in the middle of a task, one less than there are heads."""
        return len(self.heads) - (len(self.prototypes.means) < self.heads.num_classes)

    def predict(self, x: Tensor) -> Tensor:
        features = torch.stack([self.set_features(x, task) for task in range(self.num_learned)], dim=1)
        task_of = class_to_task(self.heads.sizes[: self.num_learned], x.device)
        first = self.prototypes(features[:, 0])
        scores = self.heads(features.flatten(0, 1)).unflatten(0, features.shape[:2])[..., : len(task_of)].float()
        found = retrieve(scores, task_of[first.argmax(1)], task_of, self.retrieval_steps)
        return found.softmax(1) + (self.num_learned * first).softmax(1)

    def diagnostics(self) -> dict[str, Any]:
        return {"alignment_losses": self.alignment.losses}

    # ---- state ----

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._older = None
        super().load_extra_state(state)


def retrieve(scores: Tensor, start: Tensor, task_of: Tensor, steps: int) -> Tensor:
    """Of each image, the scores under the adapters that its own predictions lead to.

    Args:
        scores: (B, tasks, C), of each image under the adapters of every task.
        start: (B,) tasks to begin with.
        task_of: (C,) tasks of the classes.
        steps: sets that an image passes at most; one that names itself is final.

    Returns:
        (B, C).
    """
    following = task_of[scores.argmax(2)]
    task = start
    for _ in range(steps - 1):
        task = following.gather(1, task.unsqueeze(1)).squeeze(1)
    return scores[torch.arange(len(scores), device=scores.device), task]
