"""The frame of methods that train low-rank branches on the attention's fused projections."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inflora import lora
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts.collective import sum_over_processes
from inflora.subspace import CovarianceAccumulator


class LowRankMethod(Method):
    """Low-rank branches on keys and values (or other slices), and the current head, trained with local cross-entropy.

    On its own this is LoRA in sequence without protection. A subclass adds what protects: a penalty in `loss`, a choice of `lora_A` in
    `begin_task`, a memory in `end_task`.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        rows: the adapted slices of the fused projection; None: keys and values.
        share_A: one `lora_A` for all slices.
        train_A: whether `lora_A` trains; else it is frozen as `reset_lora_A` draws it, until a subclass fills it.
        merges: fold the branch into the weights after each task and start the next one with a fresh branch; False: one branch that all
            tasks go on training.
        keeps_sum: keep the dense sum of what has been merged, in `merged_sum`.

    Attributes:
        merged_sum: (layers, adapted rows, embed_dim) sum of the `updates` of all finished tasks; None without `keeps_sum`.

    Raises:
        ValueError: if `rank` or `blocks` do not fit the backbone.
    """

    merged_sum: Tensor | None

    def __init__(
        self,
        backbone: Any,
        *,
        rank: int,
        blocks: list[int] | int | None,
        rows: Sequence[slice] | None = None,
        share_A: bool = False,
        train_A: bool = True,
        merges: bool,
        keeps_sum: bool = False,
    ) -> None:
        super().__init__(backbone)
        self.rank = rank
        self.targets = lora.qkv_names(backbone, blocks)
        lora.check_rank(backbone, self.targets, rank)
        self.rows = lora.kv_rows(self.heads.embed_dim) if rows is None else rows
        self.share_A, self.train_A, self.merges = share_A, train_A, merges
        assert merges or not keeps_sum
        num_rows = sum(part.stop - part.start for part in self.rows)
        shape = len(self.targets), num_rows, self.heads.embed_dim
        self.register_buffer("merged_sum", torch.zeros(shape, device=self.device) if keeps_sum else None)

    @property
    def branches(self) -> dict[str, lora.LowRankLinear]:
        """name -> layer, for every layer that has a branch now."""
        return lora.branches(self.backbone)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not self.branches:
            self.inject()

    def inject(self) -> dict[str, lora.LowRankLinear]:
        """Add fresh branches, `lora_A` drawn at random and `lora_B` zero."""
        branches = lora.inject(self.backbone, self.targets, self.rank, rows=self.rows, share_A=self.share_A, train_A=self.train_A)
        if not self.train_A:
            for branch in branches.values():
                branch.reset_lora_A()
        return branches

    def updates(self) -> Tensor:
        """(layers, adapted rows, embed_dim): what the branches add to the weights, dense. Differentiable."""
        deltas = [lora.delta_weight(branch) for branch in self.branches.values()]
        return torch.stack([torch.cat([delta[rows] for rows in self.rows]) for delta in deltas])

    def input_moments(self, task: Task, stream: str) -> dict[str, Tensor]:
        """name -> (embed_dim, embed_dim) second moment of the adapted layer's inputs, over one augmented view of each of the task's images.

        Branches that are not merged take part. For `begin_task` and `end_task`, as it sums over processes.
        """
        layers = {name: self.backbone.get_submodule(name) for name in self.targets}
        with torch.no_grad(), CovarianceAccumulator(layers, reduce=sum_over_processes) as moments:  # type: ignore[arg-type]
            for x, _ in task.batches("train", stream=stream):
                if len(x):
                    lora.run_until(layers[self.targets[-1]], self.features, x)
        return {name: moments.covariance(name) for name in self.targets}

    def branch_parameters(self) -> list[Tensor]:
        """The trained factors, layer by layer."""
        return [factor for branch in self.branches.values() for factor in ([branch.lora_A] if self.train_A else []) + [branch.lora_B]]

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": self.branch_parameters(), "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Any:
        return self.local_cross_entropy(self.features(x), y)

    def end_task(self, task: Task) -> None:
        if self.merged_sum is not None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self.merged_sum += self.updates()
        if self.merges:
            lora.merge(self.backbone)
            lora.remove(self.backbone)

    def extra_state(self) -> dict[str, Any]:
        return {"has_branch": bool(self.branches)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        lora.remove(self.backbone)
        if state["has_branch"]:
            self.inject()
