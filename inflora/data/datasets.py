"""Data sets: one function each, from a folder to decoded images with labels.

Every function takes `root` (the configuration's `dataset.root`) and `split` (`dataset.split`) and returns `Splits`. Labels are
positions in the sorted class names, unless a split brings its own numbering. A user's files are only ever read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from inflora.data.cache import FixedImages, ImageStore


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: the N decoded images.
        labels: (N,) long, the data set's own class ids.
        paths: N stable names, such as "train/apple/0001.png": they identify the image, in hashes and records.
    """

    images: ImageStore
    labels: Tensor
    paths: list[str]


@dataclass(frozen=True)
class Splits:
    """A data set as a run sees it; `class_names[label]` names a class, `split_id` how training and test images were told apart."""

    train: ImageSet
    test: ImageSet
    class_names: list[str]
    split_id: str


def digits(root: Path, *, split: str | None = None) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels: no file, no download.

    A stratified 80/20 split with the fixed seed 0, whatever the run's seed. The values 0..16 become 0..255 in three equal channels. Images
    stay 8x8 here; the transform resizes them bilinearly to the backbone's size.

    Args:
        root: not used.
        split: there is only one; must be None.
    """
    _only_split("digits", split)
    data = load_digits()
    gray = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8))
    pixels = gray.unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=0)

    def subset(name: str, rows: np.ndarray) -> ImageSet:
        kept = torch.from_numpy(np.sort(rows))
        return ImageSet(FixedImages(pixels[kept]), labels[kept], [f"{name}/{labels[row]}/{row:04d}" for row in kept.tolist()])

    return Splits(subset("train", rows[0]), subset("test", rows[1]), [str(digit) for digit in range(10)], "stratified:0")


def _only_split(name: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"dataset.split={split} is unknown: {name} has one split only; leave dataset.split=null")
