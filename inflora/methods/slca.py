"""SLCA: slow learner with classifier alignment (Zhang et al., ICCV 2023, arXiv 2303.05118)."""

from typing import Any

from torch import nn

from inflora.data.tasks import Task
from inflora.methods.sequential_full import SequentialFull
from inflora.seeding import draw_


class SLCA(SequentialFull):
    """Full fine-tuning in sequence with a backbone rate a hundred times smaller than the head's, so that features hardly move.

    This class is the slow learner. Classifier alignment is a component of its own, which the method's yaml switches on: after each task
    but the first, all heads are trained on samples from the classes' Gaussians, tested, and put back (`parts/classifier_alignment.py`;
    `alignment=none` leaves the slow learner alone). Code: github.com/GengDavid/SLCA, the authors'.

    Trains: the backbone (`optimizer.lr`) and the current head (`optimizer.head_lr`), cross-entropy over the current task's classes.
    Stores between tasks: the weights, the heads twice, and per seen class embed_dim^2 + embed_dim floats of covariance and mean.

    Heads start from a normal distribution of deviation 0.02 and bias 0. In the code, not in the paper: means shrunk towards
    0.9, the ridge on covariances, a fresh final norm. PILOT's port keeps the norm and aligns for 3 epochs instead of 5.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, softmax="current")

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        draw_(self.heads.current.weight, nn.init.trunc_normal_, std=0.02)
        nn.init.zeros_(self.heads.current.bias)
