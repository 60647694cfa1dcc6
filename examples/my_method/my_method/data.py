"""Stripes in eight directions, drawn and not read."""

import math
from pathlib import Path

import torch

from inflora.data.cache import FixedImages
from inflora.data.datasets import ImageSet, Splits
from inflora.seeding import generator

NUM_CLASSES, SIZE = 8, 32


def stripes(root: Path, *, split: str | None = None) -> Splits:
    """What `dataset._target_` names; `root` and `split` are the configuration's, and not used here."""
    names = [f"{180 * label / NUM_CLASSES:05.1f}_degrees" for label in range(NUM_CLASSES)]
    return Splits(_draw("train", 40, names), _draw("test", 10, names), names, split_id="drawn")


def _draw(part: str, count: int, names: list[str]) -> ImageSet:
    """`count` images of every class: its direction, another phase and noise in each."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(count)
    random = generator(0, f"stripes:{part}")  # not the run's seed: a data set is the same in every run
    phase = 2 * math.pi * torch.rand(len(labels), 1, 1, generator=random)
    angle = (math.pi / NUM_CLASSES * labels).view(-1, 1, 1)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = torch.sin(angle.cos() * column + angle.sin() * row + phase)  # (N, SIZE, SIZE)
    gray = 127.5 + 80 * wave + 20 * torch.randn(wave.shape, generator=random)
    pixels = gray.clamp(0, 255).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)
    paths = [f"{part}/{names[label]}/{row:04d}" for row, label in enumerate(labels.tolist())]
    return ImageSet(FixedImages(pixels), labels, paths)
