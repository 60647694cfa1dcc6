"""Decoded images as uint8."""

from typing import Protocol

import torch
from torch import Tensor


class ImageStore(Protocol):
    """Decoded RGB images, addressed by row."""

    sizes: Tensor | None
    """(N, 2) height and width of each image in pixels; None where all images have the same size."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        ...

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images `rows` (B,) as uint8 (B, 3, H, W), padded with zeros at the bottom and right, and their true (B, 2) height and width
        (None where all images of the store have the same size). Safe to call from several threads."""
        ...


class FixedImages:
    """Images of one size: `pixels` is uint8 (N, 3, H, W), in memory or memory-mapped."""

    sizes = None

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def fetch(self, rows: Tensor) -> tuple[Tensor, None]:
        return self.pixels[rows], None
