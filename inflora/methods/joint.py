"""Training on all tasks at once: the upper bound."""

from typing import ClassVar, Literal

from torch import Tensor

from inflora.parts.tuning import TunedMethod


class Joint(TunedMethod):
    """One training on the union of all tasks, with cross-entropy over all classes: what a continual method is measured against.

    Variants:
        peft: a low-rank branch on keys and values, both factors trained, as `sequential`: the bound of that parameterisation at this rank.
        full: every weight trains: the bound of the backbone.

    The sequence offers one stage with every class (`stream = "joint"`); only the last row of the accuracy matrix exists, so forgetting and
    backward transfer are undefined. The epochs are those of one task, not multiplied by their number.

    Trains and stores: one head of embed_dim + 1 floats per class, and the backbone, or a branch of 4 * num_blocks * rank * embed_dim.

    Source: no paper of its own. "Offline" in the code of CODA-Prompt (github.com/GT-RIPL/CODA-Prompt) is `full`; RanPAC's code trains it
    with other epochs than its tasks have (`args/*_publish.csv`), which is why the budget belongs to every number of this row.
    """

    stream: ClassVar[Literal["tasks", "joint"]] = "joint"

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.global_cross_entropy(self.features(x), y)
