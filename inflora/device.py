"""Copies to the device that the host does not wait for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy from host memory to a CUDA device is only queued.

    From ordinary memory CUDA copies while the host waits, which first has to wait for everything queued before: the device would run dry
    at every batch. Pinned memory it reads by itself.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
