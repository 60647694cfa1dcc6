"""Timing two ways of doing the same in turns, and measuring how far their results differ."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


class Disagreement(RuntimeError):
    """Two sides of a comparison give different numbers: a speed-up that changes results is a bug."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        ratio: how many times faster this package is, by the medians; ratio_low and ratio_high are the extremes of the single turns.
        fast_s, plain_s: medians in seconds, of so many turns.
        measure: what `difference` is: the largest that was seen, at most `tolerance`.
    """

    name: str
    ratio: float
    ratio_low: float
    ratio_high: float
    fast_s: float
    plain_s: float
    turns: int
    measure: str
    difference: float
    tolerance: float


def compare(
    name: str,
    fast: Callable[[], Any],
    plain: Callable[[], Any],
    *,
    turns: int,
    measure: str,
    distance: Callable[[Any, Any], float],
    tolerance: float,
) -> Row:
    """Time fast, plain, fast, plain, ... after one call of each to warm up.

    Raises:
        Disagreement: if the distance of what both return ever exceeds the tolerance. It says what was measured all the same.
    """
    times, differences = [], []
    for _ in range(turns + 1):
        (fast_s, fast_result), (plain_s, plain_result) = timed(fast), timed(plain)
        times.append((fast_s, plain_s))
        differences.append(distance(fast_result, plain_result))
    fast_s, plain_s = (median(side) for side in zip(*times[1:], strict=True))
    if wrong := [difference for difference in differences if not difference <= tolerance]:  # nan is refused too
        seconds = f"{fast_s:.4g} s against {plain_s:.4g} s"
        raise Disagreement(f"{name}: {measure} is {wrong[0]:.2g}, above {tolerance:.2g} ({seconds})")
    ratios = [plain / fast for fast, plain in times[1:]]
    return Row(name, plain_s / fast_s, min(ratios), max(ratios), fast_s, plain_s, turns, measure, max(differences), tolerance)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work takes, the device's part of it included, and what it returns."""
    _synchronize()
    began = time.perf_counter()
    result = work()
    _synchronize()
    return time.perf_counter() - began, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def largest(fast: Iterable[Any], plain: Iterable[Any], distance: Callable[[Any, Any], float]) -> float:
    """The largest distance of any pair; 0 if there is none."""
    return max((distance(*pair) for pair in zip(fast, plain, strict=True)), default=0.0)


def relative(fast: Tensor, plain: Tensor) -> float:
    """||fast - plain|| / ||plain||."""
    fast, plain = fast.detach().double().cpu(), plain.detach().double().cpu()
    return ((fast - plain).norm() / plain.norm()).item()


def angle(fast: Tensor, plain: Tensor) -> float:
    """The largest principal angle, in rad, between the spans of the columns; infinite if their numbers differ."""
    if fast.shape != plain.shape:
        return float("inf")
    Q_fast, Q_plain = (torch.linalg.qr(columns.double().cpu()).Q for columns in (fast, plain))
    sine = torch.linalg.matrix_norm(Q_fast - Q_plain @ (Q_plain.mT @ Q_fast), 2)  # a cosine would lose angles below 1e-8
    return sine.clamp(max=1).asin().item()


def missed_energy(fast: Tensor, plain: Tensor, C: Tensor) -> float:
    """Square root of the share by which the span of the rows of `fast` has less than that of `plain` of the energy of moments C (dim, dim).

    Near the angle between the spans where it matters which directions they have; smaller where those that differ have nearly equal energy.
    Infinite if they have different numbers of rows.
    """
    if fast.shape != plain.shape:
        return float("inf")
    C = C.double().cpu()
    found, best = (torch.linalg.qr(rows.double().cpu().mT).Q for rows in (fast, plain))
    captured, available = (torch.linalg.vecdot(C @ Q, Q, dim=0).sum() for Q in (found, best))
    return (1 - captured / available).clamp(min=0).sqrt().item()


def kept_for_backward(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the model's own tensors not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()  # while it lives, no address is used twice
    size = sum(size for address, size in kept.items() if address not in own)
    del graph
    return size
