"""Knowledge distillation: a model kept close to an older one by the scores of both."""

from typing import Any, Literal

from torch import Tensor

from inflora.data.tasks import Task
from inflora.parts.snapshot import Snapshot
from inflora.parts.tuning import TunedMethod


def distillation(scores: Tensor, old_scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the softened class probabilities of an old model and of the current one.

    Convention: not multiplied by temperature^2, as in PyCIL and PILOT; the gradient then shrinks with the temperature.

    Args:
        scores: (B, C) logits of the current model.
        old_scores: (B, C) logits of the old model for the same images and classes.
        temperature: both are divided by it.

    Returns:
        (B,) losses, in float32.

    Source: Hinton et al. 2015; Li & Hoiem 2016, eq. 2 and 3.
    """
    old = (old_scores.detach().float() / temperature).softmax(1)
    return -(old * (scores.float() / temperature).log_softmax(1)).sum(1)


def check_distillation(temperature: float, distillation_weight: float) -> None:
    """Refuse what distillation cannot work with.

    Raises:
        ValueError: naming the key.
    """
    if temperature <= 0:
        raise ValueError(f"method.temperature={temperature} is not above 0; choose a positive number, such as 2")
    if distillation_weight < 0:
        raise ValueError(f"method.distillation_weight={distillation_weight} is negative; choose 0 or more")


class DistilledMethod(TunedMethod):
    """Frame of methods that hold the model to what it said before the task, by the scores for the old classes.

    Args:
        backbone, variant, rank, blocks: see `TunedMethod`.
        distillation_weight: of the distillation in the loss.
        temperature: of the distillation.

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
    ) -> None:
        super().__init__(backbone, variant=variant, rank=rank, blocks=blocks)
        check_distillation(temperature, distillation_weight)
        self.distillation_weight, self.temperature = distillation_weight, temperature
        self.old_backbone, self.old_heads = Snapshot(), Snapshot()

    @property
    def has_teacher(self) -> bool:
        return not self.old_heads.is_empty

    def old_scores(self, x: Tensor) -> Tensor:
        """(B, old classes): what the model said when the task began."""
        return self.old_heads.call(self.heads, self.old_backbone.call(self.backbone, x))[:, : self.num_old_classes]

    def begin_task(self, task: Task) -> None:
        if self.has_teacher:
            self.old_heads.take(dict(self.heads.named_parameters()))  # again: they may have been aligned since
        super().begin_task(task)

    def end_task(self, task: Task) -> None:
        self.old_backbone.take(self.tuned)
        self.old_heads.take(dict(self.heads.named_parameters()))

    def extra_state(self) -> dict[str, Any]:
        return {"old_backbone": self.old_backbone.shapes(), "old_heads": self.old_heads.shapes()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.old_backbone.set_shapes(state["old_backbone"], self.device)
        self.old_heads.set_shapes(state["old_heads"], self.device)
