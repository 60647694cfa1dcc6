"""Decoded images as uint8: decoded once, kept in `~/.cache/inflora` (or $INFLORA_CACHE), memory-mapped from then on.

One folder per source of images holds `pixels.bin`, the images' uint8 values one after the other, each as (3, H, W), and `sizes.npy`, their
(N, 2) heights and widths. The folder's name ends in a fingerprint of the files (paths, sizes, times of change), so a changed source is
decoded anew. It appears by one rename, when complete; a lock lets one process decode while the others wait.

Images that would fill the disk are not kept: of them the folder has the sizes alone, and they are decoded whenever they are read.
"""

import errno
import io
import itertools
import logging
import os
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from inflora.data.sources import Source

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

SHARE_OF_DISK = 0.8
"""Of the free space: more is left to others."""

ESTIMATED_FROM = 200
"""Images whose headers tell how large all are."""

DECODE_CHUNK, DECODE_BYTES = 64, 2**24
"""Images per thread job: small images decode in 0.1 ms, less than it costs to hand a job to a thread. Of large ones, no more than so many
bytes: twice as many jobs as threads may be decoded and not yet written."""


# ------------------------------------------------------------------------------------------------------------------------- stores


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

    sizes: Tensor | None = None

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.pixels[rows], None


class VariableImages:
    """Images of different sizes: `flat` is uint8 (total,), the images one after the other as (3, H, W); `sizes` is (N, 2)."""

    def __init__(self, flat: np.ndarray, sizes: Tensor) -> None:
        lengths = 3 * sizes.prod(1)
        assert flat.dtype == np.uint8 and len(flat) == lengths.sum(), (flat.dtype, len(flat), lengths.sum())
        self.flat = flat
        self.sizes: Tensor | None = sizes
        self._sizes = sizes
        self._offsets = (lengths.cumsum(0) - lengths).tolist()

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        return len(self.flat)

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        sizes = self._sizes[rows].tolist()
        starts = (self._offsets[row] for row in rows.tolist())
        return _padded([self.flat[start : start + 3 * h * w].reshape(3, h, w) for start, (h, w) in zip(starts, sizes, strict=True)])


class EncodedImages:
    """The images of a source, decoded whenever they are read; `sizes` is (N, 2)."""

    def __init__(self, source: Source, sizes: Tensor) -> None:
        assert len(sizes) == len(source.paths), (len(sizes), len(source.paths))
        self._source = source
        self.sizes: Tensor | None = sizes
        self.nbytes = int(3 * sizes.prod(1).sum())

    def __len__(self) -> int:
        return len(self._source.paths)

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raises ValueError for a file that is not a readable image."""
        return _padded([_decode_one(self._source, self._source.paths[row]).transpose(2, 0, 1) for row in rows.tolist()])


def _padded(images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Images (3, h, w) as one uint8 (B, 3, H, W), zeros at the bottom and right, and their (B, 2) height and width."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    padded = np.zeros((len(images), 3, *sizes.amax(0).tolist()), np.uint8)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return torch.from_numpy(padded), sizes


class Rows:
    """Some rows of a store, as a store: a split, without copying."""

    def __init__(self, store: ImageStore, rows: Tensor) -> None:
        self._store, self._rows = store, rows
        self.sizes = None if store.sizes is None else store.sizes[rows]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        if self.sizes is None:
            return self._store.nbytes // max(1, len(self._store)) * len(self)
        return int(3 * self.sizes.prod(1).sum())

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._store.fetch(self._rows[rows])


def map_ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int, ahead: int) -> Iterator[R]:
    """Like `map`, order included, but in threads, with up to `ahead` results under way or waiting; leaving early cancels the rest."""
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="images")
    items = iter(items)
    try:
        waiting = deque(executor.submit(function, item) for item in itertools.islice(items, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------------ decoding


def cache_folder() -> Path:
    """$INFLORA_CACHE, or `~/.cache/inflora`."""
    return Path(os.environ["INFLORA_CACHE"]) if os.environ.get("INFLORA_CACHE") else Path.home() / ".cache" / "inflora"


def decoded(source: Source, name: str) -> ImageStore:
    """All images of a source, in the order of `source.paths`: from the cache, else decoded and cached.

    Where the cache cannot be written (a read-only home), the images are decoded into memory for this run. Those that would fill the disk,
    or half of the memory, are decoded whenever they are read.

    Raises:
        ValueError: if a file is not a readable image; the message names it.
        OSError: if the disk is full.
    """
    store = _find_or_decode(source, name)
    if isinstance(store, EncodedImages):
        log.info(
            "decoded, the images of %s would take %.1f GB, more than there is space for: they are decoded whenever they are read, by "
            "trainer.num_workers threads; to decode them once, set INFLORA_CACHE to a folder on a larger disk",
            source.location, store.nbytes / 1e9,
        )  # fmt: skip
    return store


def _find_or_decode(source: Source, name: str) -> ImageStore:
    prefix = f"{name}-{source.identity[:12]}"
    entry = cache_folder() / f"{prefix}-{source.fingerprint[:12]}"
    if (store := _open_entry(entry, source)) is not None and _is_to_stay(store, entry):
        return store
    lock = FileLock(entry.parent / f".{prefix}.lock")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if _estimated_bytes(source) > _memory_bytes() / 2:
            log.warning("cannot write the image cache (%s); set INFLORA_CACHE to a writable folder", error)
            return EncodedImages(source, torch.from_numpy(_decoded_sizes(source)))
        log.warning("cannot write the image cache (%s): decoding into memory for this run; set INFLORA_CACHE to a writable folder", error)
        memory = io.BytesIO()
        sizes = _decode(source, memory)
        return _store(np.frombuffer(memory.getbuffer(), np.uint8), sizes)
    with lock:
        if (store := _open_entry(entry, source)) is not None and _is_to_stay(store, entry):  # another process was faster
            return store
        for old in entry.parent.glob(f"{prefix}-*"):  # earlier states of the same source, whose space may be needed
            if old != entry:
                shutil.rmtree(old, ignore_errors=True)
        # What a killed process left is overwritten: the name is always the same, and the lock died with it.
        needed = store.nbytes if isinstance(store, EncodedImages) else _estimated_bytes(source)
        _fill(entry, source, entry.parent / f".{prefix}.partial", needed)
        store = _open_entry(entry, source)  # inside the lock: another process may take it for an earlier state
    assert store is not None
    return store


def _fill(entry: Path, source: Source, partial: Path, needed: int) -> None:
    """Decode into the folder `partial`, which becomes the cache entry; where there is no space for `needed` bytes, only sizes go there."""
    shutil.rmtree(entry, ignore_errors=True)  # damaged, if it is there
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        if _fits(needed, partial):
            with open(partial / "pixels.bin", "wb") as file:
                sizes = _decode(source, file)
        else:
            sizes = _decoded_sizes(source)
        np.save(partial / "sizes.npy", sizes)
        partial.rename(entry)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of the image cache {entry.parent} is full: free some space there, or set INFLORA_CACHE to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_entry(entry: Path, source: Source) -> ImageStore | None:
    """The images of a cache entry; None where it is missing or incomplete."""
    try:
        sizes = np.load(entry / "sizes.npy")
        if not (entry / "pixels.bin").exists():
            return EncodedImages(source, torch.from_numpy(sizes))
        flat = np.memmap(entry / "pixels.bin", np.uint8, mode="r")  # a writable one would count against the machine's memory
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, EOFError):
        return None
    return _store(flat, sizes) if len(flat) == 3 * sizes.prod(1).sum() else None


def _is_to_stay(store: ImageStore, entry: Path) -> bool:
    """Whether there is still no space for the decoded images of an entry that has only their sizes; one that has all is to stay."""
    return not isinstance(store, EncodedImages) or not _fits(store.nbytes, entry.parent)  # the entry may go at any moment


def _memory_bytes() -> float:
    """Of this machine; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _fits(num_bytes: int, folder: Path) -> bool:
    return num_bytes <= SHARE_OF_DISK * shutil.disk_usage(folder).free


def _store(flat: np.ndarray, sizes: np.ndarray) -> ImageStore:
    if (sizes == sizes[0]).all():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
            return FixedImages(torch.from_numpy(flat.reshape(len(sizes), 3, *sizes[0])))
    return VariableImages(flat, torch.from_numpy(sizes))


def _decode(source: Source, file: BinaryIO) -> np.ndarray:
    """Write all images of a source to `file`; returns their (N, 2) heights and widths."""
    log.info("decoding %d images of %s, once", len(source.paths), source.location)
    size = max(1, min(DECODE_CHUNK, DECODE_BYTES // _decoded_bytes(source, source.paths[0])))
    sizes: list[tuple[int, int]] = []
    for image in _of_all(source, _decode_one, "decoding", size):
        sizes.append((image.shape[0], image.shape[1]))
        file.write(image.transpose(2, 0, 1).tobytes())
    return np.array(sizes, dtype=np.int64)


def _decoded_sizes(source: Source) -> np.ndarray:
    """(N, 2) heights and widths of all images of a source, each decoded to see that it can be: later it would end a run on its way."""
    log.info("looking at %d images of %s, once", len(source.paths), source.location)
    return np.array(list(_of_all(source, lambda *image: _decode_one(*image).shape[:2], "looking at", DECODE_CHUNK)), dtype=np.int64)


def _of_all(source: Source, look: Callable[[Source, str], T], verb: str, size: int) -> Iterator[T]:
    """`look` at every image of a source, in order, `size` of them per thread job, with a progress bar."""
    chunks = [source.paths[start : start + size] for start in range(0, len(source.paths), size)]
    num_threads = min(16, os.cpu_count() or 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{verb} {source.location.name}", total=len(source.paths))
        for found in map_ahead(lambda paths: [look(source, path) for path in paths], chunks, num_threads, 2 * num_threads):
            yield from found
            progress.advance(bar, len(found))


def _estimated_bytes(source: Source) -> int:
    """Of all images decoded, from the headers of some, evenly spaced."""
    step = -(-len(source.paths) // ESTIMATED_FROM)
    some = source.paths[::step]
    return sum(_decoded_bytes(source, path) for path in some) * len(source.paths) // len(some)


def _decoded_bytes(source: Source, path: str) -> int:
    """Of one image, from its header; 1 where that cannot be read, which decoding will say."""
    try:
        with _open_image(source, path) as image:
            return 3 * image.height * image.width
    except ValueError:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in Pillow's mode RGB. Of 16 bits the upper eight are kept; Pillow would make white of all values above 255.

    Raises:
        ValueError: for pixels whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow opens PGM of 16 bits as numbers of 32
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers; save it with 8 or 16 bits")
    return image.convert("RGB")


def _decode_one(source: Source, path: str) -> np.ndarray:
    with _open_image(source, path) as image:
        return np.asarray(to_rgb(image))


@contextmanager
def _open_image(source: Source, path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(source.read(path))) as image:
            yield image
    except Exception as error:  # damaged files make Pillow raise anything from OSError to SyntaxError
        reason = "not an image Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
        raise ValueError(f"image {path} in {source.location} cannot be decoded ({reason}); replace or remove it, then run again") from error
