"""What the processes of a run do together; without several processes, nothing happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Anything = TypeVar("Anything")


def num_processes() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise sum of `tensor` over all processes, in place; every process gets the same numbers."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_over_processes(tensor: Tensor) -> Tensor:
    """The rows (dim 0) of all processes' tensors, one process after the other; their numbers of rows may differ."""
    if num_processes() == 1:
        return tensor
    counts = gather_objects(len(tensor))
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: Anything) -> list[Anything]:
    """What every process brings, one process after the other; it is pickled."""
    if num_processes() == 1:
        return [value]
    found: list[Anything | None] = [None] * num_processes()
    dist.all_gather_object(found, value)
    return cast(list[Anything], found)


def from_first(value: Anything) -> Anything:
    """What the first process brings, in every process; it is pickled."""
    if num_processes() == 1:
        return value
    holder = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(holder, src=0)
    return cast(Anything, holder[0])


@contextmanager
def failing_together() -> Iterator[None]:
    """For what may fail in one process alone, such as writing a file: its error is raised in all, so that none goes on and waits for it.

    At the end the processes wait for each other. No other function of this file may be called inside.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    errors = gather_objects(error)  # also where this process has one of its own: the others ask
    error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error
