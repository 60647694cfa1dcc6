"""Copies to the device that the host does not wait for."""

import torch
from torch import Tensor

READS_PINNED_MEMORY = {"cuda"}
"""Types of devices that copy from pinned host memory by themselves, while the host goes on."""


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned host memory, if `device` copies from there by itself."""
    return tensor.pin_memory() if _is_to_be_read(tensor, device) else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from host memory to a CUDA device is only queued.

    From ordinary memory CUDA copies while the host waits, which first has to wait for everything queued before: the device would run dry
    at every batch. Pinned memory it reads by itself.
    """
    return pinned(tensor, device).to(device, non_blocking=_is_to_be_read(tensor, device))


def _is_to_be_read(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == "cpu" and device.type in READS_PINNED_MEMORY
