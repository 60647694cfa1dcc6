"""SplitLoRA: splitting the space of old inputs at the size that balances stability and plasticity (Qiu et al., ICLR 2026)."""

from typing import Any

import torch
from torch import Tensor

from inflora.data.tasks import Task
from inflora.parts.low_rank import LowRankMethod


def num_principal(energies: Tensor, num_tasks: int, alpha: float) -> int:
    """How many leading directions the next branch stays out of.

    The cost of a free space of k dimensions is num_tasks times the share of energy in it, which is what old tasks may lose, minus
    alpha k / dim, which is what the new one gains. A direction is worth protecting when its share exceeds alpha / (dim num_tasks), so the
    minimum has a closed form. At least two directions are protected (as in the official code), and at least one stays free.

    Args:
        energies: (dim,) eigenvalues of the second moment of all old inputs, descending, not negative.
        num_tasks: tasks learned so far.
        alpha: above 0; the larger, the more room for new tasks.
    """
    dim = len(energies)
    worth = int((energies > alpha / (dim * num_tasks) * energies.sum()).sum())
    return min(max(worth, 2), dim - 1)


class SplitLoRA(LowRankMethod):
    """Low-rank branches on keys and values, each at random inside the minor subspace of all old inputs.

    After every task, the second moments of the adapted layers' inputs are averaged into those of the tasks before. Their eigenvectors are
    split in a principal and a minor part by `num_principal`, per layer and without a threshold to choose. The next task's `lora_A` is a
    random mixture of the minor ones, as long as a usual random start divided by the number of tasks including the new one, and frozen; the
    first task's is a usual random start. Branches are merged.

    Paper: Qiu, Zhang, Qiao, Guan, Zhang & Nie, "SplitLoRA: Balancing Stability and Plasticity in Continual Learning Through Gradient Space
    Splitting", ICLR 2026, arXiv 2505.22370. Official code: iLearn-Lab/ICLR26-SplitLoRA. What is here follows the code, which stores inputs
    where the paper speaks of gradients. Departures: decompositions in float64; every head is drawn anew, as torch's linear layers are
    (there the first as timm's, and the second task goes on from it where the sizes agree); moments are taken over one augmented view of
    each image, not ten.

    Loss: cross-entropy over the current task's classes, of scores divided by `temperature`. Trains: per adapted block
    2 * rank * embed_dim floats, and the current head. Stores between tasks: the weights, the heads, and per adapted block embed_dim^2
    floats of moments. Nothing grows but the heads.

    Args:
        backbone: a timm vision transformer without head.
        rank: of a branch, in 1..embed_dim.
        blocks: 0-based indices of the adapted blocks, or how many from the input on; None: all.
        alpha: weight of plasticity, above 0.
        temperature: what scores are divided by in the loss, above 0.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    moments: Tensor

    def __init__(self, backbone: Any, *, rank: int, blocks: list[int] | int | None, alpha: float, temperature: float) -> None:
        super().__init__(backbone, rank=rank, blocks=blocks, train_A=False, merges=True)
        for key, value in (("alpha", alpha), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"method.{key}={value} is too small; choose a number above 0")
        self.alpha, self.temperature = alpha, temperature
        dim = self.heads.embed_dim
        self.register_buffer("moments", torch.zeros(len(self.targets), dim, dim, device=self.device))
        self.num_images = self.num_tasks = 0  # learned so far

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.num_tasks:
            for moments, branch in zip(self.moments, self.branches.values(), strict=True):
                branch.set_lora_A(self.mixtures(self.minor_basis(moments), branch.lora_A))

    def minor_basis(self, moments: Tensor) -> Tensor:
        """(dim, k) float64 on the CPU: the eigenvectors of (dim, dim) `moments` that the next branch may use."""
        values, vectors = torch.linalg.eigh(_exact(moments))
        return vectors.flip(1)[:, num_principal(values.flip(0).clamp(min=0), self.num_tasks, self.alpha) :]

    def mixtures(self, basis: Tensor, lora_A: Tensor) -> Tensor:
        """Random combinations of (dim, k) `basis` in place of (slices, rank, dim) `lora_A`, whose norms over all entries set theirs."""
        mixed = torch.randn(*lora_A.shape[:2], basis.shape[1]).double() @ basis.mT
        norms = lora_A.cpu().double().norm(dim=(1, 2), keepdim=True) / (self.num_tasks + 1)
        return mixed / mixed.norm(dim=(1, 2), keepdim=True) * norms

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.local_cross_entropy(self.features(x), y, temperature=self.temperature)

    def end_task(self, task: Task) -> None:
        new = self.input_moments(task, "moments_after")
        self.num_images += task.num_train
        self.moments.lerp_(torch.stack([new[name] for name in self.targets]), task.num_train / self.num_images)
        self.num_tasks += 1
        super().end_task(task)

    def diagnostics(self) -> dict[str, Any]:
        """Per adapted block, the dimensions that the next branch may use."""
        energies = [torch.linalg.eigvalsh(_exact(moments)).flip(0).clamp(min=0) for moments in self.moments]
        return {"minor_dimensions": [len(values) - num_principal(values, self.num_tasks, self.alpha) for values in energies]}

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "num_images": self.num_images, "num_tasks": self.num_tasks}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.num_images, self.num_tasks = state["num_images"], state["num_tasks"]


def _exact(moments: Tensor) -> Tensor:
    """In float64 on the CPU, and exactly symmetric."""
    moments = moments.cpu().double()
    return (moments + moments.mT) / 2
