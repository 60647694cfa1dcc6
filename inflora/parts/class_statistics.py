"""A Gaussian for every seen class: mean and covariance of its features, and samples from it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.device import to_device
from inflora.parts.collective import sum_over_processes

RIDGE = 1e-4
"""Added to the diagonal of a covariance to make it invertible, as in the public codes: a class may have fewer images than dimensions."""

KINDS = ("full", "shared", "diag")


class GrowingBuffers(nn.Module):
    """A module whose buffers take the shapes of what is loaded, so that they may grow by class with no help from the method they are in."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # type: ignore[override]
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ClassStatistics(GrowingBuffers):
    """Mean and covariance of every seen class's features, taken once, when its task has been learned.

    Put it in a method as a submodule: its buffers are then saved, loaded and moved with the method. Classes are internal labels, in the
    order they were learned. A class without training images has count 0 and can be neither used nor sampled.

    Stores per class embed_dim floats of mean, and embed_dim^2 (full) or embed_dim (diag) of covariance; shared: embed_dim^2 in all.

    Attributes:
        counts: (C,) images of each class.
        means: (C, D).
        covariances: (C, D, D) for full, (C, D) for diag: unbiased, zero for a class of one image; (D, D) for shared: pooled within classes.

    Args:
        dim: D, the length of a feature.
        covariance: "full": each class its own; "shared": one for all; "diag": each class its own variances.

    Raises:
        ValueError: if `covariance` is none of these.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor

    def __init__(self, dim: int, *, covariance: Literal["full", "shared", "diag"], key: str = "method.covariance") -> None:
        """Args:
        key: what the user calls `covariance`, for the message.
        """
        super().__init__()
        if covariance not in KINDS:
            raise ValueError(f"{key}={covariance} is not known; choose one of {', '.join(KINDS)}")
        self.dim, self.kind = dim, covariance
        shape = {"full": (0, dim, dim), "shared": (dim, dim), "diag": (0, dim)}[covariance]
        self.register_buffer("counts", torch.zeros(0, dtype=torch.long))
        self.register_buffer("means", torch.zeros(0, dim))
        self.register_buffer("covariances", torch.zeros(shape))
        self._factors: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Classes seen."""
        return len(self.counts)

    @torch.no_grad()
    def add(self, task: Task, features: Callable[[Tensor], Tensor]) -> None:
        """Take in the classes of `task`, from all its training images as test images are prepared; over all processes.

        Args:
            features: (B, 3, H, W) images -> (B, D), for example `method.features`.
        """
        assert len(self) == task.num_old_classes, "every task once, in order"
        self.add_features(task_features(task, features), task.num_classes)

    @torch.no_grad()
    def add_features(self, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> None:
        """Take in the next `num_classes` classes; the sums over processes are done here.

        Args:
            batches: features (b, D) and their labels (b,), which follow on from the classes seen so far.

        Raises:
            ValueError: if a feature is not finite.
        """
        exact: dict[str, Any] = {"dtype": torch.float64, "device": to_float64(self.means).device}
        counts, sums = torch.zeros(num_classes, **exact), torch.zeros(num_classes, self.dim, **exact)
        squares = torch.zeros(num_classes, *((self.dim,) if self.kind == "diag" else (self.dim, self.dim)), **exact)
        with torch.autocast(self.means.device.type, enabled=False):
            for features, labels in batches:
                features, labels = features.to(**exact), labels.to(exact["device"]) - len(self)
                for label in labels.unique().tolist():
                    own = features[labels == label]
                    counts[label] += len(own)
                    sums[label] += own.sum(0)
                    squares[label] += own.square().sum(0) if self.kind == "diag" else own.mT @ own
        for total in (counts, sums, squares):
            sum_over_processes(total)
        check_finite(squares)
        self._append(counts, sums, squares)

    def _append(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """From sums over the images of each new class: how many, of the features, of their squares or outer products."""
        size = counts.view(-1, *[1] * (squares.dim() - 1))
        means = sums / counts.clamp(min=1).unsqueeze(1)
        scatter = squares - size * (means.square() if self.kind == "diag" else means.unsqueeze(2) * means.unsqueeze(1))
        if self.kind == "shared":
            freedom = (self.counts - 1).clamp(min=0).sum().to(scatter)
            new_freedom = (counts - 1).clamp(min=0).sum()
            pooled = freedom * self.covariances.to(scatter) + scatter.sum(0)
            self.covariances = (pooled / (freedom + new_freedom).clamp(min=1)).to(self.covariances)
            self._factors.clear()
        else:
            self.covariances = torch.cat([self.covariances, (scatter / (size - 1).clamp(min=1)).to(self.covariances)])
        self.means = torch.cat([self.means, means.to(self.means)])
        self.counts = torch.cat([self.counts, counts.round().to(self.counts)])

    def covariance(self, label: int) -> Tensor:
        """(D, D) covariance of a class, or for diag its (D,) variances."""
        return self.covariances if self.kind == "shared" else self.covariances[label]

    def sample(self, label: int, count: int, *, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """(count, D) features drawn from N(scale * mean, covariance + ridge) of a class.

        Drawn on the CPU, from torch's global generator or `generator`, so that all devices and processes draw the same.
        """
        noise = to_device(torch.randn(count, self.dim, generator=generator), self.means.device).to(self.means)
        factor = self._factor(0 if self.kind == "shared" else label)
        return scale * self.means[label] + (noise * factor if self.kind == "diag" else noise @ factor.mT)

    def _factor(self, index: int) -> Tensor:
        """A square root of the covariance with its ridge, computed once."""
        if index not in self._factors:
            covariance = self.covariance(index)
            factor = (covariance + RIDGE).sqrt() if self.kind == "diag" else cholesky(to_float64(covariance))
            self._factors[index] = factor.to(self.means)
        return self._factors[index]

    def _load_from_state_dict(self, *arguments: Any) -> None:  # type: ignore[override]
        self._factors.clear()
        super()._load_from_state_dict(*arguments)


def cholesky(matrix: Tensor, ridge: float = RIDGE) -> Tensor:
    """Lower factor of `matrix` plus `ridge` on its diagonal; where rounding still leaves a negative eigenvalue, plus twice that, and so on.

    Args:
        matrix: (D, D), symmetric, float64, finite.
        ridge: above 0.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not failed:
            return factor
        ridge *= 2


def check_finite(sums: Tensor) -> None:
    """Raises ValueError if sums over the features of a task's images are not finite."""
    if not sums.isfinite().all():
        raise ValueError("a feature of this task's images is not finite; lower optimizer.lr, or use trainer.precision=32")


def to_float64(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def task_features(task: Task, features: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 features (b, D) and labels (b,) of this process's part of a task's training images, prepared as test images are."""
    for x, y in task.batches("test", stream="statistics"):
        if len(x):
            yield features(x).float(), y
