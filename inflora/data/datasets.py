"""Data sets: one function each, from a folder to decoded images with labels.

Every function takes `root` (the configuration's `dataset.root`) and `split` (`dataset.split`) and returns `Splits`. Labels are
positions in the sorted class names, unless a split brings its own numbering. A user's files are only ever read.
"""

import contextlib
import errno
import hashlib
import logging
import pickle
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor
from torchvision.datasets import CIFAR100

from inflora.data.cache import FixedImages, ImageStore, Rows, cache_folder, decoded
from inflora.data.download import download
from inflora.data.sources import Source, find_source
from inflora.seeding import generator

log = logging.getLogger(__name__)


_Load = TypeVar("_Load", bound=Callable[..., "Splits"])


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


def hash_paths(paths: Sequence[str]) -> str:
    """SHA-256 of the sorted paths, one a line, each ended by a newline: identifies a set of images."""
    return hashlib.sha256("".join(f"{path}\n" for path in sorted(paths)).encode(errors="surrogateescape")).hexdigest()


def same_everywhere(load: _Load) -> _Load:
    """Marks a data set whose images are the same wherever it is looked for: looking a finished run up need not load, or download, them."""
    load.is_same_everywhere = True  # type: ignore[attr-defined]
    return load


# ------------------------------------------------------------------------------------------------------------------------- digits


@same_everywhere
def digits(root: Path, *, split: str | None = None) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels: no file, no download.

    A stratified 80/20 split with the fixed seed 0, whatever the run's seed. The values 0..16 become 0..255 in three equal channels. Images
    stay 8x8 here; the transform resizes them bilinearly to the backbone's size.

    Args:
        root: not used.
        split: there is only one; must be None.
    """
    _only_split("digits", split)
    from sklearn.datasets import load_digits  # imported where it is needed: it takes a second

    values, targets = load_digits(return_X_y=True)
    gray = torch.from_numpy((np.asarray(values) * (255 / 16)).round().astype(np.uint8))
    pixels = gray.view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(np.asarray(targets)).long()

    paths = [f"{digit}/{row:04d}" for row, digit in enumerate(labels.tolist())]
    train, test = (_subset(FixedImages(pixels), labels, paths, rows) for rows in _stratified(labels, 0))
    return Splits(train, test, [str(digit) for digit in range(10)], "stratified:0")


# ----------------------------------------------------------------------------------------------------------------------- CIFAR-100


@same_everywhere
def cifar100(root: Path, *, split: str | None = None) -> Splits:
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels, 100 classes.

    Accepted in `root`: torchvision's layout (`cifar-100-python`, or its .tar.gz, which is unpacked beside itself, or in the cache where
    that cannot be written); or `train/<class>/*` and
    `test/<class>/*` image folders, or a zip of those (see `find_source`); else it is downloaded. Images are named after their content and
    sorted by it within their class, so every layout of the exact images gives the same run.

    Args:
        root: `dataset.root`.
        split: there is only one; must be None.

    Raises:
        FileNotFoundError: if it is not there and cannot be downloaded: at most three lines that say what to put where.
        ValueError: if what is there cannot be read.
    """
    _only_split("cifar100", split)
    folder = _cifar100_folder(root)
    if folder is None and (source := find_source(root, "cifar100", _train_and_test, lambda found: not _is_of_wnids(found))) is not None:
        splits = _from_train_test(source, "cifar100")
    else:
        splits = _read_cifar100(folder or _download_cifar100(root))
    if len(splits.class_names) > 100:
        raise ValueError(
            f"dataset.root={root} holds {len(splits.class_names)} classes, CIFAR-100 has 100; run your own images with dataset=imagefolder"
        )
    _warn_unless_published("CIFAR-100", splits, num_classes=100, num_train=50_000, num_test=10_000)
    train, test = (_by_content(images, name, splits.class_names) for name, images in (("train", splits.train), ("test", splits.test)))
    return Splits(train, test, splits.class_names, "official")


def _cifar100_folder(root: Path) -> Path | None:
    """The unpacked folder in torchvision's layout, unpacking its archive first where only that is there."""
    folder = root / CIFAR100.base_folder
    for place in (folder, root):
        if _is_cifar100(place):
            return place
    if any((folder / name).is_file() for name in _CIFAR100_FILES):
        raise ValueError(f"{folder} is incomplete (it needs the files {', '.join(_CIFAR100_FILES)}); remove it, and it is unpacked again")
    archive = root if root.name == CIFAR100.filename else root / CIFAR100.filename
    return _unpack_cifar100(archive) if archive.is_file() else None


_CIFAR100_FILES = ("train", "test", "meta")
_MAY_NOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


def _is_cifar100(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CIFAR100_FILES)


def _unpack_cifar100(archive: Path) -> Path:
    """The folder of the unpacked archive, beside it; where nothing can be written there, in the cache.

    Raises:
        ValueError: if the archive is damaged.
        OSError: if there is no place for its content.
    """
    stat = archive.stat()
    cached = cache_folder() / f"{CIFAR100.base_folder}-{stat.st_size}-{stat.st_mtime_ns}"
    if _is_cifar100(cached):
        return cached
    try:
        return _unpack_to(archive, archive.parent / CIFAR100.base_folder)
    except OSError as error:
        if error.errno not in _MAY_NOT_WRITE:
            raise
        return _unpack_to(archive, cached)


def _unpack_to(archive: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: containers that share the folder have the same process numbers.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / CIFAR100.base_folder).rename(folder)
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        if _is_cifar100(folder):  # another process was faster
            return folder
        if isinstance(error, OSError) and error.errno in (*_MAY_NOT_WRITE, errno.ENOSPC, errno.EDQUOT):
            raise  # not the archive's fault
        reason = " ".join(str(error).split())
        raise ValueError(f"{archive} cannot be unpacked ({reason}); remove it to download it again, or replace it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with open(archive, "rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    if checksum.hexdigest() != CIFAR100.tgz_md5:
        log.warning("%s is not the published archive: its checksum is another", archive)  # its format does not show every damage
    return folder


def _download_cifar100(root: Path) -> Path:
    """The folder of CIFAR-100, downloaded by one process while others wait for it."""
    archive = root / CIFAR100.filename
    with _lock(f"download-{hash_paths([str(archive.resolve())])[:12]}") as had_to_wait:
        if (folder := _cifar100_folder(root)) is not None:  # another process was faster
            return folder
        try:
            if had_to_wait:
                raise ConnectionError("another process has tried")
            download(CIFAR100.url, archive, CIFAR100.tgz_md5)
        except (ConnectionError, OSError) as error:
            raise _missing_cifar100(root, error) from None
        return _unpack_cifar100(archive)


def _missing_cifar100(root: Path, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"CIFAR-100 is not in {root.resolve()} and cannot be downloaded ({error}).\n"
        f"Put {CIFAR100.filename} there (from {CIFAR100.url}),\n"
        "or folders train/<class>/* and test/<class>/*, or a zip of them; or say where they are with dataset.root=FOLDER"
    )


@contextmanager
def _lock(name: str) -> Iterator[bool]:
    """One process at a time, where the cache can be written; yields whether this one had to wait for another."""
    lock, had_to_wait = FileLock(cache_folder() / f".{name}.lock"), False
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("another process downloads; waiting for it")
                had_to_wait = True
                lock.acquire()
            held.callback(lock.release)
        yield had_to_wait


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled lists, dictionaries and NumPy arrays, and refuses whatever else a pickle can do."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar"}
        if (module.startswith("numpy") and name in allowed) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no data")


Content = TypeVar("Content")


def _read_cifar100(folder: Path) -> Splits:
    def load(name: str, make: Callable[[dict[str, Any]], Content]) -> Content:
        try:
            with open(folder / name, "rb") as file:
                content = _ArrayUnpickler(file, encoding="latin1").load()
            return make({key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()})
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{folder / name} is damaged ({error!r}); remove {folder} to download it again, or replace it") from error

    def image_set(name: str) -> ImageSet:
        def make(content: dict[str, Any]) -> ImageSet:
            pixels = torch.from_numpy(np.array(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels = torch.tensor(content["fine_labels"], dtype=torch.long)
            return ImageSet(FixedImages(pixels), labels, [f"{name}/{row}" for row in range(len(labels))])

        return load(name, make)

    class_names = load("meta", lambda content: list(content["fine_label_names"]))
    return Splits(image_set("train"), image_set("test"), class_names, "official")


def _by_content(images: ImageSet, name: str, class_names: list[str]) -> ImageSet:
    """Images sorted by class and content, called `name`/class/digest; left as they are unless they have CIFAR's 32x32 pixels."""
    if images.images.sizes is not None or images.images.fetch(torch.tensor([0]))[0].shape[2:] != (32, 32):
        return images
    pixels, _ = images.images.fetch(torch.arange(len(images.labels)))
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels.numpy()]
    labels = images.labels.tolist()
    order = sorted(range(len(labels)), key=lambda row: (labels[row], digests[row]))
    paths = [f"{name}/{class_names[labels[row]]}/{digests[row]}" for row in order]
    return ImageSet(FixedImages(pixels[order]), images.labels[order], paths)


# ---------------------------------------------------------------------------------------------------------------------- ImageNet-R

# Hashes of the test paths "n......../file.jpg", as `hash_paths` computes them, of the published splits.
_IMAGENET_R_HASHES = {
    "inflora": "524afde876563993d1e8ce5e38b638a0b394adb503ce7d09b0576ac5522dd3dd",
    "coda": "524a3ebf6dac30228a30387443c2c30a21c483b6d0d3c57768f74edd60cfecc3",
}
_INFLORA_SPLIT_SEED = 40
_WNID = re.compile(r"n\d{8}")


def imagenet_r(root: Path, *, split: str) -> Splits:
    """ImageNet-R: 30,000 renditions of 200 ImageNet classes, pictures of any size.

    Accepted in `root`: a folder `imagenet-r/<wnid>/*`, or its content, or a zip or tar of it (see `find_source`). Images that lie in
    `train/<wnid>/*` and `test/<wnid>/*` are taken too: all splits but "folders" then put them together again.

    Args:
        root: `dataset.root`.
        split: "inflora", a random 80/20 split over all images, the one of the published InfLoRA logs; "coda", the list files of
            CODA-Prompt, `imagenet-r_train.yaml` and `imagenet-r_test.yaml`, which the user puts into `root` (class numbers are the lists'
            own); "folders", as the images lie in train/ and test/; "stratified:<seed>", 80/20 within every class.

    Raises:
        FileNotFoundError: if images or list files are missing.
        ValueError: if `split` is none of these.
    """
    if re.fullmatch(r"inflora|coda|folders|stratified:\d+", str(split)) is None:
        raise ValueError(f"dataset.split={split} is unknown; choose inflora, coda, folders or stratified:<seed>")
    source = find_source(root, "imagenetr", _train_and_test if split == "folders" else _imagenet_r_folders, _is_of_wnids)
    if source is None:
        wanted = "train/<wnid>/* and test/<wnid>/*" if split == "folders" else "imagenet-r/<wnid>/*"
        raise FileNotFoundError(
            f"ImageNet-R is not in {root.resolve()}.\n"
            f"Put its images there as {wanted}, or a zip or uncompressed tar of them (imagenet-r.tar, from its authors' page),\n"
            "or say where they are with dataset.root=FOLDER"
        )
    if split == "folders":
        splits = _from_train_test(source, "imagenet_r")
        return _warn_unless_published("ImageNet-R", splits, num_classes=200, num_train=24_000, num_test=6_000)
    names = ["/".join(path.split("/")[-2:]) for path in source.paths]
    # The recipe counts files in folder order; for images already divided into train/ and test/ that is not the order they were listed in.
    order = sorted(range(len(names)), key=lambda row: names[row].rpartition("/"))
    names = [names[row] for row in order]
    labels, class_names = _labels([name.split("/")[0] for name in names])
    if split == "inflora":
        permutation = torch.randperm(len(names), generator=torch.Generator().manual_seed(_INFLORA_SPLIT_SEED))
        train, test = permutation.split([num_train := round(0.8 * len(names)), len(names) - num_train])
    elif split == "coda":
        train, test, labels, class_names = _coda_lists(root, "imagenet-r", names)
    else:
        train, test = _stratified(labels, int(split.removeprefix("stratified:")))
    images = Rows(decoded(source, "imagenet_r"), torch.tensor(order))
    splits = _divided(images, names, labels, class_names, train, test, split, "imagenet_r")
    if split in _IMAGENET_R_HASHES and hash_paths(splits.test.paths) != _IMAGENET_R_HASHES[split]:
        log.warning("the test images are not those of the published split %s of ImageNet-R", split)
        splits = replace(splits, split_id=f"{split} (unpublished)")
    return _warn_unless_published("ImageNet-R", splits, num_classes=200, num_train=24_000, num_test=6_000)


def _imagenet_r_folders(folders: set[str]) -> list[str]:
    return sorted(name for name in folders if _WNID.fullmatch(name)) or _train_and_test(folders)


def _is_of_wnids(source: Source) -> bool:
    """Whether the classes are called as ImageNet's are: data sets that lie in one folder are told apart by that."""
    return any(_WNID.fullmatch(folder) for path in source.paths for folder in path.split("/")[:-1])


def _coda_lists(root: Path, prefix: str, names: list[str]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Rows of training and test images, labels of all rows, and class names, from the list files of CODA-Prompt.

    Args:
        root: a folder with `<prefix>_train.yaml` and `<prefix>_test.yaml`, or an archive beside them.
        prefix: of the files' names.
        names: of all images, ".../class/file"; what the lists have before them does not matter.
    """
    folder = root if root.is_dir() else root.parent
    row_of = {name: row for row, name in enumerate(names)}
    num_parts = names[0].count("/") + 1
    labels = torch.full((len(names),), -1)
    found_names: dict[int, str] = {}
    both = []
    for part in ("train", "test"):
        path = folder / f"{prefix}_{part}.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset.split=coda needs the list files {prefix}_train.yaml and {prefix}_test.yaml of CODA-Prompt, and {path} "
                "is missing; put them into dataset.root, or choose another dataset.split"
            )
        try:  # with the C parser where there is one: 0.4 s for the published lists
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            pairs = zip(content["data"], content["targets"], strict=True)
            listed = {"/".join(path.split("/")[-num_parts:]): int(label) for path, label in pairs}
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no list file: it needs `data`, a list of paths, and `targets`, a label for each") from error
        missing = [name for name in listed if name not in row_of]
        if missing:
            raise ValueError(f"{path} lists {len(missing)} images that are not in dataset.root, {missing[0]} for one")
        rows = torch.tensor([row_of[name] for name in listed])
        labels[rows] = torch.tensor(list(listed.values()))
        found_names.update({label: name.split("/")[-2] for name, label in listed.items()})
        both.append(rows)
    if twice := sorted(set(both[0].tolist()) & set(both[1].tolist())):
        raise ValueError(f"the {prefix} list files in {folder} both list {names[twice[0]]}; an image is for training or for testing")
    if sorted(found_names) != list(range(len(found_names))):
        raise ValueError(f"the targets of the {prefix} list files in {folder} are not numbered 0..{len(found_names) - 1}")
    return *both, labels, [found_names[label] for label in range(len(found_names))]


def _divided(
    images: ImageStore, names: list[str], labels: Tensor, class_names: list[str], train: Tensor, test: Tensor, split: str, dataset: str
) -> Splits:
    """These rows for training and for testing, in ascending order; which they are is kept beside the decoded images."""
    train, test = train.sort().values, test.sort().values
    splits = Splits(_subset(images, labels, names, train), _subset(images, labels, names, test), class_names, split)
    _keep_index(f"{dataset}-{hash_paths(splits.test.paths)[:12]}", names, train, test)
    return splits


def _keep_index(name: str, paths: list[str], train: Tensor, test: Tensor) -> None:
    """Write which image is in which part of a split beside the decoded images, once; the split itself never depends on this file."""
    path = cache_folder() / "splits" / f"{name}.csv"
    part = dict.fromkeys(train.tolist(), "train") | dict.fromkeys(test.tolist(), "test")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(["split,path\n", *(f"{part[row]},{paths[row]}\n" for row in sorted(part))]), encoding="utf-8")
    except OSError as error:
        log.warning("cannot keep the index of the split: %s", error)


# ----------------------------------------------------------------------------------------------------------------------- DomainNet

_DOMAINS = {"clipart", "infograph", "painting", "real", "sketch"}  # no quickdraw: the published lists have none


def domainnet(root: Path, *, split: str) -> Splits:
    """DomainNet for class-incremental learning: 423,510 pictures of 345 classes, each class in five domains, mixed in every task.

    Accepted in `root`: a folder `domainnet` with `<domain>/<class>/*` (the original images, not the cleaned ones), or its content, or a
    zip or tar of it (see `find_source`). Quickdraw may lie beside the five domains and is not looked at.

    Args:
        root: `dataset.root`.
        split: "coda", the list files of CODA-Prompt and InfLoRA, `domainnet_train.yaml` and `domainnet_test.yaml`, which the user puts into
            `root` (class numbers are the lists' own); "stratified:<seed>", 80/20 within every class, whose numbers are not comparable with
            published ones.

    Raises:
        FileNotFoundError: if images or list files are missing.
        ValueError: if `split` is none of these.
    """
    if re.fullmatch(r"coda|stratified:\d+", str(split)) is None:
        raise ValueError(f"dataset.split={split} is unknown; choose coda or stratified:<seed>")
    source = find_source(
        root, "domainnet", lambda folders: sorted(_DOMAINS) if folders >= _DOMAINS else [], lambda found: bool(found.paths)
    )
    if source is None:
        raise FileNotFoundError(
            f"DomainNet is not in {root.resolve()}.\n"
            f"Put its images there as domainnet/<domain>/<class>/*, for the domains {', '.join(sorted(_DOMAINS))} (its authors' zips,\n"
            "unpacked; the original images, not the cleaned ones), or say where they are with dataset.root=FOLDER"
        )
    names = source.paths
    if stray := next((name for name in names if name.count("/") != 2), None):
        raise ValueError(f"{source.location} needs <domain>/<class>/*, but {stray} does not lie so; move it there or remove it")
    if split == "coda":
        train, test, labels, class_names = _coda_lists(root, "domainnet", names)
    else:
        labels, class_names = _labels([name.split("/")[1] for name in names])
        train, test = _stratified(labels, int(split.removeprefix("stratified:")))
    splits = _divided(decoded(source, "domainnet"), names, labels, class_names, train, test, split, "domainnet")
    if split == "coda":
        _warn_unless_published("DomainNet", splits, num_classes=345, num_train=338_808, num_test=84_702)
    return splits


# --------------------------------------------------------------------------------------------------------------------- own folders


def imagefolder(root: Path, *, split: str | None = None) -> Splits:
    """Anybody's own images.

    Accepted in `root`: `train/<class>/*` and `test/<class>/*` (or `val/`), or `<class>/*`; or a zip or tar of either (see `find_source`).

    Args:
        root: `dataset.root`.
        split: None: the train and test folders; where there are class folders only, the same as "stratified:0". "stratified:<seed>":
            80 percent of every class folder for training, 20 for test.

    Raises:
        FileNotFoundError: if there are no such folders.
        ValueError: if `split` does not fit what is there.
    """
    if split is not None and re.fullmatch(r"stratified:\d+", split) is None:
        raise ValueError(f"dataset.split={split} is unknown; choose stratified:<seed>, or null for train/ and test/ folders")
    if not root.exists():
        raise FileNotFoundError(f"dataset.root={root} does not exist; set it to a folder with train/<class>/* and test/<class>/*")
    if (source := find_source(root, "", _train_and_test)) is not None:
        if split is not None:
            raise ValueError(f"dataset.split={split} does not fit {source.location}, which has train and test folders; choose null")
        return _from_train_test(source, "imagefolder")
    source = find_source(root, "", lambda folders: sorted(folders) if len(folders) > 1 and "train" not in folders else [])
    if source is None and (root / "train").is_dir():
        raise FileNotFoundError(
            f"dataset.root={root} has a folder train, but neither test nor val; add one, or set dataset.root={root / 'train'} to have "
            "every class in it split 80 to 20 (a class of one's own cannot be called train)"
        )
    if source is None or not source.paths:
        raise FileNotFoundError(
            f"dataset.root={root} holds no image folders; it needs train/<class>/* and test/<class>/*, or only <class>/*, or a zip of them"
        )
    if split is None:
        split = "stratified:0"
        log.info("%s has no train and test folders: using dataset.split=%s", source.location, split)
    labels, class_names = _labels([path.split("/")[0] for path in source.paths])
    if {name.lower() for name in class_names} <= {"train", "training", "test", "testing", "val", "valid", "validation"}:
        raise ValueError(f"{source.location} has the folders {', '.join(class_names)}; call them train and test, or they would be classes")
    train, test = _stratified_by_class(labels, class_names, int(split.removeprefix("stratified:")))
    store = decoded(source, "imagefolder")
    return Splits(_subset(store, labels, source.paths, train), _subset(store, labels, source.paths, test), class_names, split)


# -------------------------------------------------------------------------------------------------------------------------- shared


def _only_split(name: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"dataset.split={split} is unknown: {name} has one split only; leave dataset.split=null")


def _train_and_test(folders: set[str]) -> list[str]:
    test = "test" if "test" in folders else "val"
    return ["train", test] if {"train", test} <= folders else []


def _subset(store: ImageStore, labels: Tensor, paths: list[str], rows: Tensor) -> ImageSet:
    return ImageSet(Rows(store, rows), labels[rows], [paths[row] for row in rows.tolist()])


def _labels(folders: list[str]) -> tuple[Tensor, list[str]]:
    """Labels (N,) of images in these class folders, and the sorted class names."""
    class_names = sorted(set(folders))
    label_of = {name: label for label, name in enumerate(class_names)}
    return torch.tensor([label_of[name] for name in folders]), class_names


def rows_by_class(labels: Tensor, num_classes: int) -> list[Tensor]:
    """For every class, the rows of its images, ascending."""
    return list(labels.argsort(stable=True).split(labels.bincount(minlength=num_classes).tolist()))


def _need_two_of_every_class(labels: Tensor, seed: int) -> None:
    if (few := int((labels.bincount() < 2).sum())) > 0:
        raise ValueError(f"dataset.split=stratified:{seed} needs two images of every class; {few} classes have only one")


def _stratified(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (ascending) of 80 percent of every class, and of the rest."""
    _need_two_of_every_class(labels, seed)
    from sklearn.model_selection import train_test_split

    num_classes = len(labels.unique())
    share = 0.2 if 0.2 * len(labels) >= num_classes else num_classes  # scikit-learn wants at least one image per class
    train, test = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))


def _stratified_by_class(labels: Tensor, class_names: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """As `_stratified`, but each class by itself: where classes are added, those that were there before are split as before."""
    _need_two_of_every_class(labels, seed)
    train, test = [], []
    for name, rows in zip(class_names, rows_by_class(labels, len(class_names)), strict=True):
        rows = rows[torch.randperm(len(rows), generator=generator(seed, f"split:{name}"))]
        num_test = max(1, round(0.2 * len(rows)))
        test.append(rows[:num_test])
        train.append(rows[num_test:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _from_train_test(source: Source, name: str) -> Splits:
    """The splits of a source whose paths are train/<class>/... and test/<class>/... (or val/<class>/...)."""
    inside = [path.split("/") for path in source.paths]
    stray = [path for path, parts in zip(source.paths, inside, strict=True) if len(parts) < 3]
    if stray or {parts[0] == "train" for parts in inside} != {True, False}:
        what = f"{stray[0]} lies in no class folder" if stray else "train or test has no images"
        raise ValueError(f"dataset.root: {source.location} needs train/<class>/* and test/<class>/*, but {what}")
    labels, class_names = _labels([parts[1] for parts in inside])
    is_train = torch.tensor([parts[0] == "train" for parts in inside])
    untrained = sorted(set(labels[~is_train].tolist()) - set(labels[is_train].tolist()))
    if untrained:
        raise ValueError(
            f"dataset.root: {source.location} has test images of {len(untrained)} classes without training images, "
            f"{class_names[untrained[0]]} for one; add them to train/ or remove them from test/"
        )
    store = decoded(source, name)
    names = [path if path.startswith("train/") else f"test/{path.split('/', 1)[1]}" for path in source.paths]
    train, test = is_train.nonzero().flatten(), (~is_train).nonzero().flatten()
    return Splits(_subset(store, labels, names, train), _subset(store, labels, names, test), class_names, "folders")


def _warn_unless_published(name: str, splits: Splits, **published: int) -> Splits:
    found = {"num_classes": len(splits.class_names), "num_train": len(splits.train.labels), "num_test": len(splits.test.labels)}
    if found != published:
        text = [f"{found[key]} {key.removeprefix('num_')} ({published[key]})" for key in found]
        log.warning("this is not all of %s; found, and in brackets published: %s", name, ", ".join(text))
    return splits
