"""A GPU's rules without a GPU: a device whose tensors lie in host memory, but do not mix with others and are waited for as on CUDA.

Inside `far_device()`, tensors on `FAR` are `FarTensor`s: their numbers are those of a CPU tensor, and torch sees them on another device.
An operation on tensors of both devices raises, as CUDA's does, and what would make the host wait for a GPU is noted. What this cannot
show: memory, speed, the numbers of CUDA's kernels, mixed precision.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators.cpu import CPUAccelerator
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from inflora import trainer

FAR = torch.device("meta", 0)
"""A type that torch's autograd takes without a driver. Code that wants torch's own meta tensors says "meta", without a number."""

aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave without output_size",
}
"""Operations whose result, or its size, the host has to know."""

INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}


@dataclass
class Notes:
    """What happened on the device: `what at file:line:function < ...` of the package.

    Attributes:
        waits: what the host waited for, where `watching`.
        draws: random numbers drawn there: other ones than a CPU draws.
        queue: copies on their way to the host, which holds other numbers until an event after them is waited for, and what they bring.
    """

    watching: bool = True
    waits: list[str] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)
    queue: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def wait(self, what: str) -> None:
        if self.watching:
            self.waits.append(f"{what} at {_place()}")


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if Path(trainer.__file__).parent in Path(frame.filename).parents]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}:{frame.name}" for frame in reversed(frames[-3:]))


class FarTensor(Tensor):
    """A tensor on `FAR`; its numbers are `numbers`, on the CPU."""

    numbers: Tensor

    def __new__(cls, numbers: Tensor) -> "FarTensor":
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        far = Tensor._make_wrapper_subclass(cls, numbers.size(), device=FAR, **layout)  # type: ignore[attr-defined]
        far.numbers = numbers
        return far

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        raise AssertionError("a tensor of the far device is used after the device has gone")

    # What torch does to a subclass without asking it.

    is_meta = False  # type: ignore[assignment]  # loading a state passes meta tensors over

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: "FarTensor") -> None:
        assert isinstance(other, FarTensor) and (other.shape, other.dtype) == (self.shape, self.dtype)
        self.numbers = other.numbers

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype if dtype is None else dtype).to(FAR)


class _Mode(TorchDispatchMode):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        options = dict(options or {})
        if operation in (aten._to_copy.default, aten.copy_.default):
            return self._copy(operation, arguments, options)
        if operation is aten.is_pinned.default:
            return hasattr(arguments[0], "is_pinned_here")
        if operation in (aten._pin_memory.default, aten.pin_memory.default):
            copy = arguments[0].clone()
            if arguments[0].is_contiguous():  # CUDA copies what has gaps by way of ordinary memory
                copy.is_pinned_here = True
            return copy
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        is_far = any(isinstance(tensor, FarTensor) for tensor in tensors)
        if is_far:
            self._check(operation, arguments, tensors)
        if options.get("device") is not None:
            is_far = _moved(options)
        if is_far and torch.Tag.nondeterministic_seeded in operation.tags and "attention" not in operation.name():
            self.notes.draws.append(f"{operation} at {_place()}")
        result = operation(*tree_map(_near, arguments), **tree_map(_near, options))
        if not is_far:
            return result
        written = _written(operation, arguments, options)
        if written:
            assert all(tensor.shape == tensor.numbers.shape for tensor in written), f"{operation} has changed a shape"
            returns = len(operation._schema.returns)
            return written[0] if returns == 1 else tuple(written) if returns else None
        return tree_map(lambda leaf: FarTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _copy(self, operation: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Tensor:
        is_in_place = operation is aten.copy_.default
        source = arguments[1] if is_in_place else arguments[0]
        queued = len(arguments) > 2 and arguments[2] if is_in_place else options.get("non_blocking", False)
        to_far = isinstance(arguments[0], FarTensor) if is_in_place or options.get("device") is None else _moved(options)
        if to_far and not isinstance(source, FarTensor):
            if not (queued and hasattr(source, "is_pinned_here")) and not (is_in_place and source.dim() == 0):
                self.notes.wait("copy from ordinary memory")
        elif not to_far and isinstance(source, FarTensor):
            if queued and not is_in_place:  # CUDA copies to pinned memory then
                arriving = torch.full_like(source.numbers, -1, device="cpu")
                self.notes.queue.append((arriving, source.numbers.clone()))
                return arriving
            self.notes.wait("copy to the host")
        result = operation(*tree_map(_near, arguments), **options)
        if is_in_place:
            return arguments[0]
        return FarTensor(result) if to_far else result

    def _check(self, operation: Any, arguments: Sequence[Any], tensors: list[Tensor]) -> None:
        """Note what CUDA would wait for, and refuse what it would."""
        if operation in INDEXING and isinstance(arguments[0], FarTensor):
            indices = [index for index in arguments[1] if index is not None]
            if not all(isinstance(index, FarTensor) for index in indices):
                self.notes.wait("index from ordinary memory")
            fills = len(arguments) > 2 and arguments[2].numel() == 1  # which CUDA does by a mask
            if any(index.dtype == torch.bool for index in indices) and not fills:
                self.notes.wait("index by a mask")
            tensors = [leaf for leaf in arguments[2:] if isinstance(leaf, Tensor)]
        if any(not isinstance(tensor, FarTensor) and tensor.dim() > 0 for tensor in tensors):
            raise RuntimeError(f"{operation}: tensors on two devices at {_place()}")
        if operation in WAITS:
            self.notes.wait(WAITS[operation])


def _near(value: Any) -> Any:
    return value.numbers if isinstance(value, FarTensor) else value


def _moved(options: dict[str, Any]) -> bool:
    """Whether the options ask for the far device; then they ask for the CPU from now on."""
    is_far = torch.device(options["device"]) == FAR
    if is_far:
        options["device"] = torch.device("cpu")
    return is_far


def _written(operation: Any, arguments: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The tensors that an operation changes."""
    named = {argument.name: value for argument, value in zip(operation._schema.arguments, arguments, strict=False)} | options
    changed = [
        argument.name for argument in operation._schema.arguments if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for name in changed for leaf in tree_leaves(named.get(name)) if isinstance(leaf, FarTensor)]


class _Event:
    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def record(self) -> None:
        self.before = self.notes.queue.copy()

    def synchronize(self) -> None:
        for arriving, numbers in self.before:
            arriving.copy_(numbers)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


@contextmanager
def far_device() -> Iterator[Notes]:
    """A device `FAR`, on which runs of this process and thread take place."""
    notes = Notes()
    autocast, original, device_module = torch.autocast, torch.tensor, torch.get_device_module
    events = SimpleNamespace(Event=lambda: _Event(notes))

    class Autocast(autocast):  # of the far type there is none; in full precision it has nothing to do
        def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
            super().__init__("cpu" if device_type == FAR.type else device_type, *arguments, **options)

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:  # torch's own would be a meta tensor without numbers
        made = original(data, **options)
        return made if device is None else made.to(device)

    def fabric(settings: dict[str, Any]) -> Fabric:
        return Fabric(strategy=SingleDeviceStrategy(device=FAR, accelerator=_Accelerator()))

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr("inflora.device.READS_PINNED_MEMORY", {FAR.type})
        patch.setattr(torch, "get_device_module", lambda *device: events if device == (FAR,) else device_module(*device))
        patch.setattr("inflora.run.make_fabric", fabric)
        patch.setattr("lightning_fabric.fabric._has_meta_device_parameters_or_buffers", lambda *arguments, **options: False)
        patch.setattr(trainer, "evaluate", torch.no_grad()(trainer.evaluate.__wrapped__))  # type: ignore[attr-defined]  # inference tensors take no subclass
        torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps its parameters, as between a CPU and CUDA
        try:
            with _Mode(notes):
                yield notes
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
