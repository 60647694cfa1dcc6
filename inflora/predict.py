"""Classify image files with an exported model: `python -m inflora.predict EXPORT_DIR image...`.

Everything needed is in the folder that `inflora.export` wrote; model and preprocessing are timm's.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from inflora.backbone import load_exported

BATCH_SIZE = 32


class Classifier:
    """An exported model with its preprocessing and the names of its classes.

    Args:
        folder: what `inflora.export` wrote.

    Raises:
        ValueError: if the folder holds no such model.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self.model, self.transform = load_exported(folder)
        self.class_names: list[str] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["label_names"]
        self.model.to(device)
        self.device = device

    @torch.inference_mode()
    def probabilities(self, files: Sequence[Path]) -> Tensor:
        """(len(files), classes), on the CPU: softmax of the scores.

        Raises:
            ValueError: if a file cannot be read as an image.
        """
        x = torch.stack([self.transform(_open(file)) for file in files])
        return self.model(x.to(self.device)).float().softmax(1).cpu()


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and those with an image's suffix at any depth of the folders, sorted.

    Raises:
        ValueError: if a path does not exist, or a folder holds no image.
    """
    suffixes = Image.registered_extensions()
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            if not found:
                raise ValueError(f"{path} holds no image")
            yield from found
        elif path.exists():
            yield path
        else:
            raise ValueError(f"{path} does not exist")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m inflora.predict", description="Classify image files with an exported model.")
    parser.add_argument("model", type=Path, metavar="EXPORT_DIR", help="what `python -m inflora.export` wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name for each (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    given = parser.parse_args(arguments)
    table = Table("image", *(f"{place}." for place in range(1, given.top + 1)))
    try:
        if given.top < 1:
            raise ValueError(f"--top={given.top} names no class; choose 1 or more")
        classifier = Classifier(given.model, device=given.device)
        files = list(image_files(given.images))
        batches = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
        for batch in track(batches, description="classifying", console=Console(stderr=True), transient=True):
            for file, row in zip(batch, classifier.probabilities(batch), strict=True):
                best = row.topk(min(given.top, len(row)))
                answers = [f"{classifier.class_names[label]} {100 * p:.1f} %" for p, label in zip(*map(Tensor.tolist, best), strict=True)]
                table.add_row(str(file), *answers)
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
