"""C-LoRA: self-regularised low-rank adaptation (Smith et al., TMLR 2024, arXiv 2304.06027)."""

from typing import Any

import torch
from torch import Tensor

from inflora.parts.low_rank import LowRankMethod


class CLoRA(LowRankMethod):
    """A low-rank branch per task on keys and values, kept away from the weight entries that earlier branches changed.

    The loss has a penalty: the sum over all adapted weights of (S * delta)^2, entry by entry, where S is what earlier tasks added to the
    weight and delta what the current branch adds. Entries nobody changed cost nothing. Finished branches are merged.

    Paper: Smith, Hsu, Zhang, Hua, Kira, Shen & Jin, "Continual Diffusion: Continual Customization of Text-to-Image Diffusion with
    C-LoRA", for cross-attention in diffusion models. No code of the authors for classification is public; this is the method as the
    InfLoRA paper compares with it on ViTs: the penalty is summed, not averaged, and its weight 0.5 goes with the sum. Other methods of the
    same name (a routing method of 2025, for one) are something else.

    Trains: per adapted block 4 * rank * embed_dim floats, and the current head; cross-entropy over the current task's classes.
    Stores between tasks: the weights, the heads, and S: 2 * embed_dim^2 floats per adapted block, whatever the number of tasks.

    `lora_A` is drawn Kaiming-uniform (a = sqrt 5), `lora_B` starts at zero: there the penalty's gradient is zero.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        penalty: weight of the penalty, 0 or more.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(self, backbone: Any, *, rank: int, blocks: list[int] | int | None, penalty: float) -> None:
        super().__init__(backbone, rank=rank, blocks=blocks, merges=True, keeps_sum=True)
        if not penalty >= 0:
            raise ValueError(f"method.penalty={penalty} is no weight of a penalty; choose 0 or more")
        self.penalty = penalty

    def self_regularization(self) -> Tensor:
        """Sum of the squared products of what earlier tasks and this one add to each weight."""
        assert self.merged_sum is not None
        with torch.autocast(self.device.type, enabled=False):
            return (self.merged_sum * self.updates()).square().sum()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + self.penalty * self.self_regularization()
