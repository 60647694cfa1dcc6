"""InfLoRA: interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv 2404.00228)."""

import logging
import warnings
from typing import Any, Literal

from inflora.data.tasks import Task
from inflora.parts.low_rank import LowRankMethod
from inflora.subspace import DualGPM, MissingDirectionsWarning, design_branch, threshold_at

log = logging.getLogger(__name__)


class InfLoRA(LowRankMethod):
    """Low-rank branches on keys and values, each confined to a subspace that leaves the older tasks' inputs alone.

    Before a task, one pass over its images gives the second moments of every adapted layer's inputs. Of the directions that `DualGPM` does
    not protect, the leading ones become the frozen `lora_A`; only `lora_B` and the task's head train. Afterwards a second pass tells
    `DualGPM` which directions to protect next, and the branch is merged into the weights.

    Trains: per adapted block 2 * rank * embed_dim floats, and the current head; cross-entropy over the current task's classes.
    Stores between tasks: the weights, the heads, and per adapted block at most embed_dim^2 / 2 floats of basis (twice that without
    `dual`). Nothing grows with the number of tasks but the heads; with alignment (the preset `inflora_ca`), also a Gaussian of
    embed_dim^2 + embed_dim floats per class.

    Official code: github.com/liangyanshuo/InfLoRA. Departures from it: branches are merged (it sums all of them in every forward pass),
    decompositions run in float64, exhausted subspaces give zero rows instead of arbitrary ones (`subspace.design_branch`), and a task of
    one class uses the softmax over all seen classes.

    Args:
        backbone: a timm vision transformer without head.
        rank: rows of `lora_A`, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all. 5 is InfLoRA-b5.
        threshold: epsilon at the first task, in [0, 1].
        threshold_end: the epsilon that later tasks approach linearly.
        energy: "gram": energy of the second moments, as the published code has it; "input": of the inputs, as the paper says.
        decomposition: "PC": singular vectors of the projected moments (published code); "PCP": of the projected inputs (paper).
        lora_A_scale: norm of the designed rows.
        dual: store the smaller of the protected space and its complement; False is plain GPM.

    Raises:
        ValueError: if an argument does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        rank: int,
        blocks: list[int] | int | None,
        threshold: float,
        threshold_end: float,
        energy: Literal["gram", "input"],
        decomposition: Literal["PC", "PCP"],
        lora_A_scale: float,
        dual: bool,
    ) -> None:
        super().__init__(backbone, rank=rank, blocks=blocks, share_A=True, train_A=False, merges=True)
        threshold_at(0, 1, threshold, threshold_end)  # complains before any data is loaded
        if decomposition not in ("PC", "PCP"):
            raise ValueError(f"method.decomposition={decomposition} is not known; choose PC or PCP")
        self.threshold, self.threshold_end = threshold, threshold_end
        self.decomposition: Literal["PC", "PCP"] = decomposition
        self.lora_A_scale = lora_A_scale
        self.memory = {name: DualGPM(self.heads.embed_dim, energy=energy, dual=dual) for name in self.targets}
        # The thresholds follow the length planned at the first task, also when a finished sequence is continued with further tasks.
        self.planned_tasks: int | None = None

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.planned_tasks is None:
            self.planned_tasks = task.num_tasks
        moments = self.input_moments(task, "moments_before")  # lora_B is still zero: those of the weights before the task
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MissingDirectionsWarning)
            for name, branch in self.branches.items():
                branch.set_lora_A(
                    design_branch(moments[name], self.memory[name], self.rank, decomposition=self.decomposition, scale=self.lora_A_scale)
                )
        short = [warning.message for warning in caught if warning.category is MissingDirectionsWarning]
        for other in (warning for warning in caught if warning.category is not MissingDirectionsWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if short:
            few = f"{len(short)} of {len(self.targets)} layers have too little space left for their branch"
            log.warning("task %d: %s; the first: %s", task.index, few, short[0])

    def end_task(self, task: Task) -> None:
        assert self.planned_tasks is not None
        moments = self.input_moments(task, "moments_after")
        threshold = threshold_at(task.index, self.planned_tasks, self.threshold, self.threshold_end)
        for name in self.targets:
            self.memory[name].update(moments[name], threshold)
        super().end_task(task)

    def diagnostics(self) -> dict[str, Any]:
        """Per adapted block, the dimension of the protected space and how it is stored."""
        return {
            "protected_dimensions": [self.memory[name].dimension for name in self.targets],
            "memory_kinds": [self.memory[name].kind for name in self.targets],
        }

    def extra_state(self) -> dict[str, Any]:
        return {
            **super().extra_state(),
            "memory": {name: memory.state_dict() for name, memory in self.memory.items()},
            "planned_tasks": self.planned_tasks,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        for name, memory in self.memory.items():
            memory.load_state_dict(state["memory"][name])
        self.planned_tasks = state["planned_tasks"]
