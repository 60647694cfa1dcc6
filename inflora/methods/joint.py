"""Training on all tasks at once: the upper bound."""

from typing import Any, ClassVar, Literal

from torch import Tensor

from inflora import lora
from inflora.method import Method


class Joint(Method):
    """One training on the union of all tasks, with cross-entropy over all classes: what a continual method is measured against.

    Variants:
        peft: a low-rank branch on keys and values, both factors trained, as `sequential`: the bound of that parameterisation at this rank.
        full: every weight trains: the bound of the backbone.

    The sequence offers one stage with every class (`stream = "joint"`); only the last row of the accuracy matrix exists, so forgetting and
    backward transfer are undefined. The epochs are those of one task, not multiplied by their number.

    Trains: the branch or the backbone, and one head. Stores: the same.
    """

    stream: ClassVar[Literal["tasks", "joint"]] = "joint"

    def __init__(self, backbone: Any, *, variant: Literal["peft", "full"], rank: int, blocks: list[int] | None) -> None:
        super().__init__(backbone)
        if variant not in ("peft", "full"):
            raise ValueError(f"method.variant={variant} is not known; choose peft or full")
        self.variant = variant
        if variant == "peft":
            targets = lora.qkv_names(backbone, blocks)
            lora.check_rank(backbone, targets, rank)
            lora.inject(backbone, targets, rank, rows=lora.kv_rows(self.heads.embed_dim), share_A=False, train_A=True)

    def param_groups(self) -> list[dict[str, Any]]:
        if self.variant == "full":
            body = list(self.backbone.parameters())
        else:
            body = [factor for branch in lora.branches(self.backbone).values() for factor in (branch.lora_A, branch.lora_B)]
        return [
            {"params": body, "role": "branch"},
            {"params": list(self.heads.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.global_cross_entropy(self.features(x), y)
