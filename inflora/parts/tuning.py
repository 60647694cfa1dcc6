"""The frame of classical methods: all weights, or one low-rank branch, go on training from task to task."""

from typing import Any, Literal

from torch import nn

from inflora import lora
from inflora.method import Method


class TunedMethod(Method):
    """Trains the same parameters of the backbone on every task, and all heads.

    Variants:
        peft: one low-rank branch on keys and values, both factors, as `sequential` with `variant=seqlora`; the weights stay frozen.
        full: every weight.

    Args:
        backbone: a timm vision transformer without head.
        variant: "peft" or "full".
        rank: of the branch, in 1..embed_dim; not used by "full".
        blocks: 0-based indices of the adapted blocks; None: all. Not used by "full".

    Raises:
        ValueError: if the variant is unknown, or the branch does not fit the backbone.
    """

    def __init__(self, backbone: Any, *, variant: Literal["peft", "full"], rank: int, blocks: list[int] | None) -> None:
        super().__init__(backbone)
        if variant not in ("peft", "full"):
            raise ValueError(f"method.variant={variant} is not known; choose peft or full")
        self.variant: str = variant
        if variant == "peft":
            targets = lora.qkv_names(backbone, blocks)
            lora.check_rank(backbone, targets, rank)
            lora.inject(backbone, targets, rank, rows=lora.kv_rows(self.heads.embed_dim), share_A=False, train_A=True)

    @property
    def tuned(self) -> dict[str, nn.Parameter]:
        """name -> trained parameter of the backbone."""
        parameters = dict(self.backbone.named_parameters())
        if self.variant == "full":
            return parameters
        return {name: parameter for name, parameter in parameters.items() if name.endswith((".lora_A", ".lora_B"))}

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.tuned.values()), "role": "branch"},
            {"params": list(self.heads.parameters()), "role": "head"},
        ]
