"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282)."""

from typing import Any, Literal

from torch import Tensor

from inflora.parts.distillation import DistilledMethod, distillation


class LwF(DistilledMethod):
    """On a new task's images the model keeps giving the scores for the old classes that it gave before the task.

    Loss: cross-entropy over the current task's classes + `distillation_weight` * distillation over all old classes together
    (`parts.distillation`), from a frozen copy of the model as the last task left it. No old image is kept.

    Code: the authors' is for MatConvNet (github.com/lizhitwo/LearningWithoutForgetting); PyCIL (models/lwf.py), mammoth (models/lwf.py).
    Trains: one branch on keys and values (`variant=peft`, ours: the authors and these codes train every weight, `variant=full`), and all
    heads. Stores between tasks: the model, and again what of it trains: the factors, 4 * num_blocks * rank * embed_dim floats (or the
    backbone), and the heads, (embed_dim + 1) floats per class, the only part that grows.

    Readings: distillation without temperature^2, jointly over the old classes (the paper: per old task), with the softmax over the new
    classes apart, as PyCIL; mammoth trains the softmax over all seen classes, and takes the old scores once, without augmentation.

    Args:
        backbone, variant, rank, blocks: see `TunedMethod`.
        distillation_weight: the paper has 1, PyCIL 3, mammoth 0.5.
        temperature: of the distillation.
        warmup_epochs: in so many first epochs of every later task only the new head trains, as the paper does until convergence.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["peft", "full"],
        rank: int,
        blocks: list[int] | None,
        distillation_weight: float,
        temperature: float,
        warmup_epochs: int,
    ) -> None:
        super().__init__(
            backbone, variant=variant, rank=rank, blocks=blocks, distillation_weight=distillation_weight, temperature=temperature
        )
        if warmup_epochs < 0:
            raise ValueError(f"method.warmup_epochs={warmup_epochs} is negative; choose 0 or more")
        self.warmup_epochs = warmup_epochs

    def begin_epoch(self, epoch: int) -> None:
        is_warmup = self.has_teacher and epoch < self.warmup_epochs
        for parameter in [*self.tuned.values(), *self.heads.heads[:-1].parameters()]:
            parameter.requires_grad_(not is_warmup)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.features(x)
        loss = self.local_cross_entropy(features, y)
        if not self.has_teacher:
            return loss
        scores = self.heads(features)[:, : self.num_old_classes]
        return loss + self.distillation_weight * distillation(scores, self.old_scores(x), self.temperature).mean()
