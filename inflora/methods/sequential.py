"""LoRA in sequence, without protection."""

from typing import Any, Literal

from torch import Tensor

from inflora import lora
from inflora.method import Method

VARIANTS = ("seqlora", "inclora", "inclora_frozen")


class Sequential(Method):
    """Low-rank branches on keys and values, trained on one task after the other with nothing that protects the older ones.

    Variants:
        seqlora: one branch shared by all tasks; both factors train on every task and are never reset.
        inclora: a fresh branch per task, merged into the weights afterwards.
        inclora_frozen: as inclora, but `lora_A` stays at its random start and is shared by k and v: InfLoRA without its design step.

    Trains: the branch and the current head (cross-entropy over the current task's classes). Stores between tasks: the weights, the heads
    and, for seqlora, one branch of 2 * num_blocks * 2 * rank * embed_dim floats; nothing grows but the heads.

    `lora_A` is drawn Kaiming-uniform (a = sqrt 5), `lora_B` starts at zero.
    """

    def __init__(
        self, backbone: Any, *, variant: Literal["seqlora", "inclora", "inclora_frozen"], rank: int, blocks: list[int] | None
    ) -> None:
        super().__init__(backbone)
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.rank = rank
        self.targets = lora.qkv_names(backbone, blocks)
        lora.check_rank(backbone, self.targets, rank)

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        if not lora.branches(self.backbone):
            self._inject()

    def _inject(self) -> None:
        frozen = self.variant == "inclora_frozen"
        rows = lora.kv_rows(self.heads.embed_dim)
        lora.inject(self.backbone, self.targets, self.rank, rows=rows, share_A=frozen, train_A=not frozen)
        if frozen:
            for branch in lora.branches(self.backbone).values():
                branch.reset_lora_A()

    def param_groups(self) -> list[dict[str, Any]]:
        branches = lora.branches(self.backbone).values()
        factors = [branch.lora_B for branch in branches]
        if self.variant != "inclora_frozen":
            factors += [branch.lora_A for branch in branches]
        return [
            {"params": factors, "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.local_cross_entropy(self.features(x), y)

    def end_task(self, task: Any) -> None:
        if self.variant != "seqlora":
            lora.merge(self.backbone)
            lora.remove(self.backbone)

    def extra_state(self) -> dict[str, Any]:
        return {"has_branch": bool(lora.branches(self.backbone))}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        lora.remove(self.backbone)
        if state["has_branch"]:
            self._inject()
