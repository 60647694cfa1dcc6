"""Learning-rate schedules: the factor on the base rate in each epoch of a task.

A schedule is a function of (epoch, epochs) without state, stepped once per epoch, so a resumed run needs nothing but the epoch's number.
"""

import math
from collections.abc import Sequence


def constant(epoch: int, epochs: int) -> float:
    """The base rate throughout."""
    return 1.0


def cosine(epoch: int, epochs: int) -> float:
    """Cosine annealing to zero after the last epoch: torch's CosineAnnealingLR with T_max = epochs."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def cosine99(epoch: int, epochs: int, *, lag: int) -> float:
    """The "99-percent cosine" of the CODA-Prompt code base, used for the published InfLoRA numbers.

    factor(e) = cos(99 pi s / (200 (epochs - 1))) with s = max(0, e - lag); one epoch trains at the base rate.

    Args:
        epoch: 0-based.
        epochs: epochs of the task.
        lag: 1 for what the published code runs (its scheduler spends the first step on construction, so two epochs run at the base rate),
            0 for the formula as intended (the last epoch at 1.6 % of the base rate).
    """
    if epochs == 1:
        return 1.0
    return math.cos(99 * math.pi * max(0, epoch - lag) / (200 * (epochs - 1)))


def step(epoch: int, epochs: int, *, milestones: Sequence[int], gamma: float) -> float:
    """Multiply by `gamma` after each milestone, counted in finished epochs: with 18, epochs 0..17 run at the base rate."""
    return gamma ** sum(epoch >= milestone for milestone in milestones)
