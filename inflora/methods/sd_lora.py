"""SD-LoRA: decoupled directions and magnitudes (Wu et al., ICLR 2025, arXiv 2501.13198)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inflora import lora
from inflora.data.tasks import Task
from inflora.parts.low_rank import LowRankMethod
from inflora.seeding import draw_


class DirectionsLinear(lora.LowRankLinear):
    """The branch of the current task, and beside it the frozen directions of the older ones, each times a magnitude.

    Attributes:
        old_A: (slices, R, in), R the sum of the older tasks' ranks. Of each task and slice, the 2-norm of all entries is one.
        old_B: (slices, rows of a slice, R), likewise.
        ranks: of the older tasks.
    """

    old_A: Tensor
    old_B: Tensor

    def attach(self, magnitudes: nn.Parameter, ranks: Sequence[int]) -> None:
        """Make room for older directions.

        Args:
            magnitudes: (older tasks + 1,), the last one for the current branch; shared by all layers, so none of them registers it.
            ranks: of the older tasks.
        """
        self._magnitudes = [magnitudes]
        self.ranks = list(ranks)
        slices, rows, _ = self.lora_B.shape
        self.register_buffer("old_A", self.weight.new_zeros(slices, sum(ranks), self.in_features, requires_grad=False))
        self.register_buffer("old_B", self.weight.new_zeros(slices, rows, sum(ranks), requires_grad=False))

    def sliced_factors(self) -> tuple[Tensor, Tensor]:
        magnitudes = self._magnitudes[0].unbind()
        columns = torch.cat([value.expand(rank) for value, rank in zip(magnitudes, [*self.ranks, self.rank], strict=True)])
        return torch.cat([self.old_B, self.lora_B], -1) * columns, torch.cat([self.old_A, self.lora_A], -2)

    @torch.no_grad()
    def directions(self) -> tuple[Tensor, Tensor]:
        """`old_A` and `old_B` as the next task needs them, with the current branch. One that has not moved has no direction: zeros."""
        factors = []
        for factor in (self.lora_A, self.lora_B):
            norm = factor.norm(dim=(-2, -1), keepdim=True)
            factors.append(factor / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return torch.cat([self.old_A, factors[0]], -2), torch.cat([self.old_B, factors[1]], -1)

    def clear(self) -> None:
        super().clear()
        self.old_B.zero_()


class SDLoRA(LowRankMethod):
    """The directions of all earlier branches stay, frozen and normalised; their magnitudes are learned anew with every task's branch.

    In task t a weight is W + sum_(j<t) a_j B_j A_j / (|B_j| |A_j|) + a_t B_t A_t, on queries and values, with 2-norms over all entries.
    The magnitudes a are scalars shared by all blocks and by queries and values. At a task's start the newest direction goes from
    un-normalised to normalised and all magnitudes go back to their first value: the function jumps, and training has to find it again.

    Paper: Wu, Piao, Huang, Wang, Li, Pfister, Meng, Ma & Wei, "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental
    Learning". Official code: WuYichen-97/SD-Lora-CL. Its configurations say Adam; what runs is SGD with momentum 0.9 at a constant rate,
    and so it does here. Its magnitudes start at 0.8 (1 in a re-implementation). `rank_reduction` is the paper's SD-LoRA-RR. The second
    variant, SD-LoRA-KD, is not in that code and is left out.

    Trains: per adapted block 4 * rank * embed_dim floats, one magnitude per task so far, and the current head (drawn as in the official
    code); cross-entropy over the current task's classes. Stores between tasks: the weights, the heads, and per task
    4 * rank * embed_dim floats of directions per adapted block; the cost of a step grows with them.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        magnitude: where all magnitudes start in every task.
        rank_reduction: 0-based task -> rank from that task on; None: `rank` throughout.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(
        self, backbone: Any, *, rank: int, blocks: list[int] | int | None, magnitude: float, rank_reduction: Mapping[int, int] | None
    ) -> None:
        dim = int(backbone.num_features)
        super().__init__(backbone, rank=rank, blocks=blocks, rows=(slice(0, dim), slice(2 * dim, 3 * dim)), merges=False)
        if not magnitude > 0:
            raise ValueError(f"method.magnitude={magnitude} starts without the branches; choose a number above 0, such as 0.8")
        self.rank_reduction = dict(rank_reduction or {})
        if not all(isinstance(t, int) and t >= 1 and 1 <= r <= dim for t, r in self.rank_reduction.items()):
            raise ValueError(f"method.rank_reduction={self.rank_reduction} is no map from tasks (1 or more) to ranks in 1..{dim}")
        self.magnitude = magnitude
        self.magnitudes = nn.Parameter(torch.zeros(0, device=self.device))
        self.ranks: list[int] = []

    @property
    def directed(self) -> dict[str, DirectionsLinear]:
        """`branches`, by their type."""
        return {name: branch for name, branch in self.branches.items() if isinstance(branch, DirectionsLinear)}

    def rank_of(self, task_index: int) -> int:
        """The rank of a task's branch."""
        return ({0: self.rank} | self.rank_reduction)[max(t for t in (0, *self.rank_reduction) if t <= task_index)]

    def begin_task(self, task: Task) -> None:
        older = {name: branch.directions() for name, branch in self.directed.items()}
        lora.remove(self.backbone)
        self.ranks.append(self.rank_of(len(self.ranks)))
        super().begin_task(task)
        for name, branch in self.directed.items():
            if name in older:
                branch.old_A.copy_(older[name][0])
                branch.old_B.copy_(older[name][1])
        draw_(self.heads.current.weight, nn.init.kaiming_uniform_, nonlinearity="linear")
        nn.init.zeros_(self.heads.current.bias)

    def inject(self) -> dict[str, lora.LowRankLinear]:
        """Fresh branches for the newest task, with room for the directions of those before, and fresh magnitudes."""
        self.magnitudes = nn.Parameter(torch.full((len(self.ranks),), float(self.magnitude), device=self.device))
        branches = lora.inject(
            self.backbone, self.targets, self.ranks[-1], rows=self.rows, share_A=False, train_A=True, layer=DirectionsLinear
        )
        for branch in branches.values():
            branch.attach(self.magnitudes, self.ranks[:-1])
        return dict(branches)

    def param_groups(self) -> list[dict[str, Any]]:
        branch, head = super().param_groups()
        return [branch | {"params": [*branch["params"], self.magnitudes]}, head]

    def diagnostics(self) -> dict[str, Any]:
        """The magnitudes a task ended with, oldest branch first."""
        return {"magnitudes": self.magnitudes.tolist()}

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "ranks": list(self.ranks)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.ranks = list(state["ranks"])
        self.magnitudes = nn.Parameter(torch.zeros(0, device=self.device))
        super().load_extra_state(state)
