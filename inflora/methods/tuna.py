"""TUNA: task-specific and universal adapters (Wang, Zhou & Ye, ICCV 2025, arXiv 2508.08165)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.classifier import TaskHeads
from inflora.data.tasks import Task
from inflora.parts import adapters
from inflora.parts.adapter_sets import AdapterSetMethod
from inflora.parts.classifier_alignment import ClassifierAlignment
from inflora.parts.prototypes import cosine

UNIVERSAL = 0
"""The set of adapters that holds the fused ones; the tasks' follow."""


class TUNA(AdapterSetMethod):
    """A set of adapters per task, and one fused from all of them; an image is answered by the task's set that is surest and the fused one.

    Each task's adapters start as the last task's. Fusion takes every number of every adapter by itself: its sign is that of the mean over
    the tasks, its size the largest among the tasks that agree with the sign. All heads are then trained on samples from the classes'
    Gaussians. A score is the sum of two probabilities over all seen classes: under the task's set whose probabilities have the least
    entropy for this image, and under the fused set.

    Loss: cross-entropy over the current task's classes of `scale` times cosines with the heads' weights, less `margin` at the right class;
    plus, from the second task (t = 1) on, `orthogonality` * exp(-t - 1) times the overlap of the new adapters with the older ones. For a
    task of one class the cross-entropy is zero, and its head learns from the samples alone.

    Trains per task L * (2 * D * bottleneck + bottleneck + D) floats (L blocks, D = embed_dim) and the current head. Stores that for every
    task and once more for the fused set, and per class D^2 + D floats of Gaussian. An image takes a pass through the backbone per task,
    and one more.

    Official code: by the authors, in the history of the public fork github.com/Ngahoang2005/ICCV2025-TUNA (commit 77d4f10). It fuses,
    but tests with the newest task's set in place of the fused one (its forward pass compares the set's number with that of the tasks, one
    off); here, as in the paper, the fused one answers. There the overlap's gradient and the weight decay also reach the `up` weights
    of the older sets, which shrink with every task; here they rest. The rate of the alignment swings with a period of ten epochs there,
    here it falls to zero once; a division by a negative number shrinks the means of new classes most, here those of old classes
    (`alignment.mean_scale`); old heads decay while a task trains, which changes no cosine at once but lets them turn faster in the next
    alignment, here they rest.

    Args:
        backbone: a timm vision transformer without head.
        bottleneck, adapter_scale, dropout: of an adapter.
        scale: of the cosines.
        margin: at the right class, in training.
        orthogonality: weight of the overlap.
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
        scale: float,
        margin: float,
        orthogonality: float,
        alignment: dict[str, Any],
    ) -> None:
        super().__init__(backbone, bottleneck=bottleneck, adapter_scale=adapter_scale, dropout=dropout)
        if scale <= 0:
            raise ValueError(f"method.scale={scale} is not above 0; choose a positive number, such as 20")
        for key, value in (("margin", margin), ("orthogonality", orthogonality)):
            if value < 0:
                raise ValueError(f"method.{key}={value} is negative; choose 0 or more")
        self.margin, self.orthogonality = margin, orthogonality
        self.add_set()  # the universal one
        self.heads = CosineHeads(self.heads.embed_dim, scale)
        self.alignment = ClassifierAlignment(self.heads.embed_dim, temperature=None, restore=False, key="method.alignment", **alignment)

    @property
    def num_task_sets(self) -> int:
        return self.num_sets - 1

    def task_set(self, task: int) -> list[adapters.Adapter]:
        """The adapters of a task, block by block."""
        return adapters.adapter_set(self.backbone, 1 + task)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.add_set(copied_from=self.num_sets - 1 if self.num_task_sets else None)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.branch_and_head(self.heads.current)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        scores, y = self.heads.current(self.features(x)), y - self.num_old_classes
        self.observe(scores, y)
        loss = F.cross_entropy(scores - self.heads.scale * self.margin * F.one_hot(y, scores.shape[1]), y)
        if self.num_task_sets > 1 and self.orthogonality:
            loss = loss + self.orthogonality * math.exp(-self.num_task_sets) * self.overlap()
        return loss

    def overlap(self) -> Tensor:
        """Sum over the older tasks, mean over the blocks, of |mean cosine| between the rows of the new and of the old `up` weight."""
        *old_sets, new = (
            torch.stack([F.normalize(adapter.up.weight, dim=1).mean(0) for adapter in self.task_set(task)])
            for task in range(self.num_task_sets)
        )
        return sum(((new * old).sum(1).abs().mean() for old in old_sets), new.new_zeros(()))

    # ---- after a task ----

    def end_task(self, task: Task) -> None:
        self.fuse()
        self.alignment.statistics.add(task, self.features)
        if len(self.heads) > 1:
            self.align()

    @torch.no_grad()
    def fuse(self) -> None:
        """Fill the universal set from those of all tasks."""
        sets = [self.task_set(task) for task in range(self.num_task_sets)]
        for universal, *own in zip(adapters.adapter_set(self.backbone, UNIVERSAL), *sets, strict=True):
            for target, *values in zip(universal.parameters(), *(adapter.parameters() for adapter in own), strict=True):
                target.copy_(fused(torch.stack(values)))

    def align(self) -> None:
        """Train all heads on samples from the classes' Gaussians."""
        weight = torch.cat([head.weight.detach() for head in self.heads.heads])  # type: ignore[operator]
        (weight,) = self.alignment.fit([weight], lambda features: self.heads.scale * cosine(features, weight), self.heads.sizes)
        with torch.no_grad():
            for head, own in zip(self.heads.heads, weight.split(self.heads.sizes), strict=True):
                head.weight.copy_(own)  # type: ignore[operator, union-attr]

    # ---- scores ----

    def probabilities(self, x: Tensor, index: int) -> Tensor:
        """(B, seen classes) under a set of adapters."""
        with adapters.active(self.backbone, index):
            return self.heads(self.features(x)).softmax(1)

    def predict(self, x: Tensor) -> Tensor:
        specific = torch.stack([self.probabilities(x, 1 + task) for task in range(self.num_task_sets)])
        return surest(specific) + self.probabilities(x, UNIVERSAL)

    def diagnostics(self) -> dict[str, Any]:
        return {"alignment_losses": self.alignment.losses}


def fused(values: Tensor) -> Tensor:
    """(tasks, ...) -> (...): the largest absolute value among those with the sign of the mean, and that sign; 0 counts as negative."""
    sign = torch.where(values.mean(0) > 0, 1.0, -1.0)
    return sign * (values * sign).clamp(min=0).amax(0)


def surest(probabilities: Tensor) -> Tensor:
    """(tasks, B, C) -> (B, C): of each image, the row of least entropy; the earliest of equals."""
    entropy = -(probabilities * (probabilities + 1e-10).log()).sum(2)
    return probabilities[entropy.argmin(0), torch.arange(probabilities.shape[1], device=probabilities.device)]


class CosineHead(nn.Linear):
    """scale * cosine(feature, weight of the class), without bias; weights start normal (0, 0.02^2)."""

    def __init__(self, embed_dim: int, num_classes: int, scale: float) -> None:
        super().__init__(embed_dim, num_classes, bias=False)
        self.scale = scale
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * cosine(input, self.weight)


class CosineHeads(TaskHeads):
    """One cosine head per task; all have the same scale, so that their scores compare."""

    def __init__(self, embed_dim: int, scale: float) -> None:
        super().__init__(embed_dim)
        self.scale = scale

    def grow(self, num_classes: int, device: torch.device) -> nn.Linear:
        head = CosineHead(self.embed_dim, num_classes, self.scale).to(device)
        self.heads.append(head)
        return head
