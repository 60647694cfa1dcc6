"""LoRA-DRS: LoRA subtraction for a drift-resistant space (Liu & Chang, CVPR 2025, arXiv 2503.18985)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora import lora
from inflora.data.tasks import Task
from inflora.parts.low_rank import LowRankMethod
from inflora.parts.prototypes import Prototypes, class_means
from inflora.subspace import DualGPM


def augmented_triplet_loss(features: Tensor, y: Tensor, prototypes: Tensor, margin: float) -> Tensor:
    """Mean over a batch of max(0, margin + distance to the farthest of the same class - distance to the nearest of another class).

    Others are the images of the batch and the class means of older tasks. Where there is none, the loss is zero.

    Args:
        features: (B, D); they and the prototypes are scaled to length one first.
        y: (B,) classes.
        prototypes: (C, D), none of a class in `y`.
        margin: of the hinge.
    """
    with torch.autocast(features.device.type, enabled=False):
        anchors, means = F.normalize(features.float(), dim=1), F.normalize(prototypes.float(), dim=1)
        within, across = _distances(anchors, anchors), _distances(anchors, means)
        is_same = y.unsqueeze(0) == y.unsqueeze(1)
        is_positive = is_same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)  # an image is at distance 0 of itself
        farthest = within.masked_fill(~is_positive, 0).amax(1)
        nearest = torch.cat([within.masked_fill(is_same, torch.inf), across], 1).amin(1)
        return F.relu(margin + farthest - nearest).mean()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(A, B) Euclidean distances between rows of length one; at least 1e-6, where the root still has a gradient."""
    return (2 - 2 * a @ b.mT).clamp(min=1e-12).sqrt()


class LoRADRS(LowRankMethod):
    """Branches on keys and values that move only within the leading directions of the new task's inputs, as a model without the old tasks'
    branches sees them.

    Before a task (but the first), what earlier tasks added is subtracted from the *pretrained* weights, W_0 - sum_(j<t) B_j A_j, and one
    pass gives the second moments of every adapted layer's inputs. The leading eigenvectors that hold `threshold` of the energy span the
    drift-resistant space. With P their projector divided by its 2-norm over all entries, every step of the optimiser is projected: that of
    `lora_A` becomes (step P), that of `lora_B` (P step). Cross-entropy is joined by a triplet loss on normalised features, with class
    means of older tasks among the negatives. Scores are cosines with class means, taken when a class is learned; heads serve training.

    Official code: scarlet0703/LoRA-Sub-DRS, read in a later fork at the authors' last commit. What is here follows it where the paper says
    less: the projector's norm, which makes later tasks' steps shorter; the input space's projector on the output side of `lora_B`; the
    projection of Adam's step, not of the gradient; and a `lora_B` that starts with one entry of standard deviation 0.01 in every column.
    Departures: branches are merged (the code sums all of them in every pass), decompositions run in float64, Adam's epsilon is torch's (the
    code adds it before the bias correction).

    Loss: cross-entropy over the current task's classes + `triplet` * triplet loss. With several processes each looks for triplets in its
    own part of the batch. Trains: per adapted block 4 * rank * embed_dim floats, and the current head. Stores between tasks: the weights,
    the heads, per adapted block 2 * embed_dim^2 floats of what was added, and embed_dim floats per class; in a task embed_dim^2 more.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        threshold: share of the inputs' energy that the drift-resistant space holds, in (0, 1].
        triplet: weight of the triplet loss, 0 or more.
        margin: of the triplet loss, 0 or more.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    projectors: Tensor

    def __init__(
        self, backbone: Any, *, rank: int, blocks: list[int] | int | None, threshold: float, triplet: float, margin: float
    ) -> None:
        super().__init__(backbone, rank=rank, blocks=blocks, merges=True, keeps_sum=True)
        if not 0 < threshold <= 1:
            raise ValueError(f"method.threshold={threshold} is no share of energy; choose a number above 0, at most 1")
        for key, value in (("triplet", triplet), ("margin", margin)):
            if not value >= 0:
                raise ValueError(f"method.{key}={value} is negative; choose 0 or more")
        self.threshold, self.triplet, self.margin = threshold, triplet, margin
        dim = self.heads.embed_dim
        self.prototypes = Prototypes(dim)
        self.register_buffer("projectors", torch.zeros(0, dim, dim, device=self.device))  # of the current task, layer by layer
        self.dimensions: list[int] = []
        self._before_step: list[tuple[Tensor, Tensor]] = []

    def begin_task(self, task: Task) -> None:
        if len(self.heads):
            self.projectors = self.design_projectors(task)
        super().begin_task(task)

    def design_projectors(self, task: Task) -> Tensor:
        """(layers, embed_dim, embed_dim): the projectors on the drift-resistant spaces, divided by their norms."""
        with self.subtracted():
            moments = self.input_moments(task, "moments_before")
        projectors, self.dimensions = [], []
        for name in self.targets:
            space = DualGPM(self.heads.embed_dim, energy="input", dual=False)
            space.update(moments[name], self.threshold)
            projectors.append(space.basis @ space.basis.mT / space.dimension**0.5)
            self.dimensions.append(space.dimension)
        return torch.stack(projectors).to(self.projectors)

    @contextmanager
    def subtracted(self) -> Iterator[None]:
        """Inside, the adapted layers have the pretrained weights minus what the finished tasks added to them."""
        assert self.merged_sum is not None and not self.branches
        layers = [self.backbone.get_submodule(name) for name in self.targets]
        originals = [layer.weight.detach().clone() for layer in layers]  # type: ignore[union-attr, operator]
        sizes = [rows.stop - rows.start for rows in self.rows]
        with torch.no_grad():
            for layer, added in zip(layers, self.merged_sum, strict=True):
                for rows, part in zip(self.rows, added.split(sizes), strict=True):
                    layer.weight[rows] -= 2 * part  # type: ignore[index, operator]
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, original in zip(layers, originals, strict=True):
                    layer.weight.copy_(original)  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def inject(self) -> dict[str, lora.LowRankLinear]:
        """Fresh branches; one entry of every column of `lora_B` is drawn, the others are zero."""
        branches = super().inject()
        for branch in branches.values():
            slices, rows, rank = branch.lora_B.shape
            where, values = torch.randint(rows, (slices, 1, rank)), 0.01 * torch.randn(slices, 1, rank)
            branch.lora_B.scatter_(1, where.to(branch.lora_B.device), values.to(branch.lora_B))
        return branches

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.features(x)
        loss = self.local_cross_entropy(features, y)
        if self.triplet:
            loss = loss + self.triplet * augmented_triplet_loss(features, y, self.prototypes.means, self.margin)
        return loss

    def begin_epoch(self, epoch: int) -> None:
        self._remember()

    def _remember(self) -> None:
        """Where the factors stand before the optimiser's next step."""
        self._before_step = [(branch.lora_A.detach().clone(), branch.lora_B.detach().clone()) for branch in self.branches.values()]

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep of the step what lies in the drift-resistant space."""
        if not len(self.projectors):
            return
        for projector, branch, (lora_A, lora_B) in zip(self.projectors, self.branches.values(), self._before_step, strict=True):
            branch.lora_A.copy_(lora_A + (branch.lora_A - lora_A) @ projector)
            branch.lora_B.copy_(lora_B + projector @ (branch.lora_B - lora_B))
        self._remember()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.projectors = self.projectors[:0].clone()  # a view would keep them all
        with torch.autocast(self.device.type, enabled=False):
            self.prototypes.add(class_means(self.features, task, self.heads.embed_dim, self.device))

    def predict(self, x: Tensor) -> Tensor:
        return self.prototypes(self.features(x))

    def diagnostics(self) -> dict[str, Any]:
        """Per adapted block, the dimension of the drift-resistant space the task had; nothing for the first task."""
        return {"drift_resistant_dimensions": self.dimensions}

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "dimensions": list(self.dimensions)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.dimensions = list(state["dimensions"])
        self.projectors = self.projectors.new_empty(state["tensors"]["projectors"].shape)
