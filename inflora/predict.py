"""Classify image files with an exported model: `python -m inflora.predict EXPORT_DIR image...`.

Everything needed is in the folder that `inflora.export` wrote; model and preprocessing are timm's. Prints one line for each image, its
parts separated by tabs: the file, then class and probability, best first.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from inflora.backbone import load_exported
from inflora.data.cache import to_rgb
from inflora.data.sources import is_image
from inflora.device import has_device
from inflora.terminal import tolerate_any_encoding

BATCH_SIZE = 32


class Classifier:
    """An exported model with its preprocessing and the names of its classes.

    Args:
        folder: what `inflora.export` wrote.
        device: "cpu", "cuda" or "mps".
        module: the module that makes timm know the architecture, where timm does not by itself.

    Raises:
        ValueError: if the folder holds no such model, or torch finds no such device.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", module: str | None = None) -> None:
        if not has_device(device):
            raise ValueError(f"--device={device}, but torch finds no such device on this machine; choose cpu")
        self.model, self.transform, self.class_names = load_exported(folder, module)
        self.model.to(device)
        self.device = device

    def read(self, file: Path) -> Tensor:
        """(3, S, S): an image file as the model takes it.

        Raises:
            ValueError: if it cannot be read as an image.
        """
        try:
            with Image.open(file) as image:
                return self.transform(to_rgb(image))
        except Exception as error:  # damaged files make Pillow raise anything from OSError to SyntaxError
            raise ValueError(f"{file} cannot be read as an image: {error}") from error

    @torch.inference_mode()
    def probabilities(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, classes), on the CPU: softmax of the scores."""
        return self.model(x.to(self.device)).float().softmax(1).cpu()


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and the images at any depth of the folders, sorted.

    Raises:
        ValueError: if a path does not exist, or a folder holds no image.
    """
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and is_image(file.relative_to(path).as_posix()))
            if not found:
                raise ValueError(f"{path} holds no image")
            yield from found
        elif path.exists():
            yield path
        else:
            raise ValueError(f"{path} does not exist")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if anything could not be classified."""
    parser = argparse.ArgumentParser(
        prog="python -m inflora.predict",
        description="Classify image files with an exported model. Prints a line for each image: the file, then class and probability, best "
        "first, separated by tabs.",
    )
    parser.add_argument("model", type=Path, metavar="EXPORT_DIR", help="what `python -m inflora.export` wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name for each (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="default: cpu")
    parser.add_argument("--import", dest="module", metavar="MODULE", help="what makes timm know a backbone of one's own; its code runs")
    given = parser.parse_args(arguments)
    tolerate_any_encoding()
    code = 0
    try:
        if given.top < 1:
            raise ValueError(f"--top={given.top} names no class; choose 1 or more")
        classifier = Classifier(given.model, device=given.device, module=given.module)
        files = list(image_files(given.images))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for start in range(0, len(files), BATCH_SIZE):
        read: list[tuple[Path, Tensor]] = []
        for file in files[start : start + BATCH_SIZE]:
            try:
                read.append((file, classifier.read(file)))
            except ValueError as error:  # the others still have their turn
                print(f"error: {error}", file=sys.stderr)
                code = 1
        if read:
            rows = classifier.probabilities(torch.stack([x for _, x in read]))
            for (file, _), row in zip(read, rows, strict=True):
                best = row.topk(min(given.top, len(row)))
                answers = [f"{classifier.class_names[label]} {100 * p:.1f} %" for p, label in zip(*map(Tensor.tolist, best), strict=True)]
                print(file, *answers, sep="\t", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
