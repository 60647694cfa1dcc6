"""Which devices there are; copies to a device and from it that the host does not wait for."""

import torch
from torch import Tensor

READS_PINNED_MEMORY = {"cuda"}
"""Types of devices that copy from pinned host memory by themselves, while the host goes on."""


def has_device(device: str) -> bool:
    """Whether torch finds a device of this kind on this machine."""
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device, lambda: True)()


def is_cpu(device: str) -> bool:
    """Whether a run on this kind of device, which may be `auto`, is one on the CPU."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available())


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned host memory, if `device` copies from there by itself: without gaps, which it cannot copy."""
    return tensor.contiguous().pin_memory() if _is_to_be_read(tensor, device) else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from host memory to a CUDA device is only queued.

    From ordinary memory CUDA copies while the host waits, which first has to wait for everything queued before: the device would run dry
    at every batch. Pinned memory it reads by itself.
    """
    return pinned(tensor, device).to(device, non_blocking=_is_to_be_read(tensor, device))


class Arriving:
    """A tensor's copy in host memory, which the host waits for when it asks for it, and then for nothing queued later."""

    def __init__(self, tensor: Tensor) -> None:
        is_queued = tensor.device.type in READS_PINNED_MEMORY
        self._copy = tensor.to("cpu", non_blocking=is_queued, copy=True)
        self._event = torch.get_device_module(tensor.device).Event() if is_queued else None
        if self._event is not None:
            self._event.record()

    def get(self) -> Tensor:
        """The copy, complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def _is_to_be_read(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == "cpu" and device.type in READS_PINNED_MEMORY
