"""Full fine-tuning in sequence, without protection."""

from typing import Any, Literal

from torch import Tensor

from inflora.method import Method


class SequentialFull(Method):
    """All weights of the backbone train on every task; nothing protects the older ones. What the field calls the lower bound.

    Trains: the backbone and the current head (`softmax="current"`), or all heads (`softmax="seen"`). Stores between tasks: the weights, and
    embed_dim + 1 floats per class.

    Source: no paper of its own; "FT" and "FT++" in the code of CODA-Prompt (github.com/GT-RIPL/CODA-Prompt), "finetune" in LAMDA-PILOT.
    Public codes differ in the loss: cross-entropy over the current task's classes ("FT++", our default) or over all seen classes ("FT"),
    which forgets far more. `softmax` chooses.
    """

    def __init__(self, backbone: Any, *, softmax: Literal["current", "seen"]) -> None:
        super().__init__(backbone)
        if softmax not in ("current", "seen"):
            raise ValueError(f"method.softmax={softmax} is not known; choose current or seen")
        self.softmax = softmax

    def param_groups(self) -> list[dict[str, Any]]:
        heads = self.heads.current if self.softmax == "current" else self.heads
        return [
            {"params": list(self.backbone.parameters()), "role": "branch"},
            {"params": list(heads.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.softmax == "seen":
            return self.global_cross_entropy(self.features(x), y)
        return self.local_cross_entropy(self.features(x), y)
