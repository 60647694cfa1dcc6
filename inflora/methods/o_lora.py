"""O-LoRA: orthogonal low-rank adaptation (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.data.tasks import Task
from inflora.parts.low_rank import LowRankMethod

OVERLAPS = ("l1", "l2")


class OLoRA(LowRankMethod):
    """A low-rank branch per task on keys and values, whose `lora_A` is pushed to be orthogonal to those of the tasks before.

    The loss has a penalty on all products between rows of the new `lora_A` and rows of the older ones of the same projection; `lora_B` is
    free. Finished branches are merged, and their `lora_A` kept. That makes parameters orthogonal to parameters, not to the older tasks'
    inputs: a weaker condition than InfLoRA's.

    Paper: Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui & Huang, "Orthogonal Subspace Learning for Language Model Continual Learning".
    Official code: cmnfriend/O-LoRA, for T5 and LLaMA (rank 8 on queries and values, scale 4, dropout 0.1, rate 1e-3, for LLaMA 1e-4 from
    the second task on, one epoch). There is no vision setting of the authors: keys and values, scale 1 and no dropout are ours, as for the
    other low-rank methods here.

    Readings: the paper squares the products, the code sums their absolute values (`overlap`: "l2", "l1"). Rows are not normalised there, so
    a shorter `lora_A` with a longer `lora_B` lowers the penalty for nothing; `normalise` compares directions instead. The code adds the
    2-norms of the new factors, with a weight that most of its scripts set to 0 (`norm_penalty`).

    Trains: per adapted block 4 * rank * embed_dim floats, and the current head; cross-entropy over the current task's classes.
    Stores between tasks: the weights, the heads, and per task 2 * rank * embed_dim floats of `lora_A` per adapted block.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        penalty: weight of the overlap, 0 or more; the overlap is a sum, so it grows with the number of tasks.
        overlap: "l1": sum of the absolute products; "l2": of their squares.
        normalise: take the products between rows of length one.
        norm_penalty: weight of the 2-norms of the new factors, 0 or more.

    Raises:
        ValueError: if an argument is out of range, unknown, or does not fit the backbone.
    """

    old_A: Tensor

    def __init__(
        self,
        backbone: Any,
        *,
        rank: int,
        blocks: list[int] | int | None,
        penalty: float,
        overlap: Literal["l1", "l2"],
        normalise: bool,
        norm_penalty: float,
    ) -> None:
        super().__init__(backbone, rank=rank, blocks=blocks, merges=True)
        for key, value in (("penalty", penalty), ("norm_penalty", norm_penalty)):
            if not value >= 0:
                raise ValueError(f"method.{key}={value} is no weight of a penalty; choose 0 or more")
        if overlap not in OVERLAPS:
            raise ValueError(f"method.overlap={overlap} is not known; choose l1 or l2")
        self.penalty, self.norm_penalty = penalty, norm_penalty
        self.overlap, self.normalise = overlap, normalise
        shape = len(self.targets), len(self.rows), 0, self.heads.embed_dim
        self.register_buffer("old_A", torch.zeros(shape, device=self.device))
        self.mean_overlap: float | None = None

    def new_A(self) -> Tensor:
        """(layers, slices, rank, embed_dim)."""
        return torch.stack([branch.lora_A for branch in self.branches.values()])

    def overlaps(self) -> Tensor:
        """The penalised sum over all products between old and new rows."""
        with torch.autocast(self.device.type, enabled=False):
            old, new = self.old_A, self.new_A()
            if self.normalise:
                old, new = F.normalize(old, dim=-1), F.normalize(new, dim=-1)
            products = old @ new.mT
            return products.abs().sum() if self.overlap == "l1" else products.square().sum()

    def norms(self) -> Tensor:
        """Sum of the 2-norms of the new factors, each slice its own."""
        return torch.stack([factor.norm(dim=(-2, -1)) for factor in self.branch_parameters()]).sum()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y) + self.penalty * self.overlaps()
        return loss + self.norm_penalty * self.norms() if self.norm_penalty else loss

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        new = self.new_A()
        if self.old_A.shape[2]:
            with torch.autocast(self.device.type, enabled=False):
                cosines = F.normalize(self.old_A, dim=-1) @ F.normalize(new, dim=-1).mT
            self.mean_overlap = cosines.abs().mean().item()
        self.old_A = torch.cat([self.old_A, new], dim=2)
        super().end_task(task)

    def diagnostics(self) -> dict[str, Any]:
        """The mean absolute cosine between rows of the finished `lora_A` and of the older ones: what the penalty leaves, at any norm."""
        return {"overlap": self.mean_overlap}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.old_A = self.old_A.new_empty(state["tensors"]["old_A"].shape)
