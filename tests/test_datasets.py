"""Every data set in every layout, built from tiny images; the real ones where $INFLORA_TEST_DATA points to them."""

import dataclasses
import errno
import hashlib
import inspect
import itertools
import os
import pickle
import shutil
import socket
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from inflora.config import DatasetConfig
from inflora.data import cache, datasets
from inflora.data.datasets import Splits, cifar100, digits, domainnet, hash_paths, imagefolder, imagenet_r
from inflora.data.tasks import Loading, TaskSequence, split_task_sizes
from inflora.data.transforms import build_transforms

WNIDS = ["n01443537", "n02165456", "n03594945"]
CLASSES = ["apple", "bear", "chair"]
FILES = {
    f"{part}/{name}/{number}.png": (part, name)
    for part, count in (("train", 5), ("test", 2))
    for name in CLASSES
    for number in range(count)
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path) -> Iterator[None]:
    """Whatever a test builds in `tmp_path / "data"` before its first call must be there afterwards, unchanged."""
    root, before = tmp_path / "data", {}

    def remembering(original: Callable[..., Any]) -> Callable[..., Any]:
        def remember(*args: Any) -> Any:
            before.update({path: _state(path) for path in root.rglob("*")} if not before else {})
            return original(*args)

        return remember

    with pytest.MonkeyPatch.context() as patch:
        for name in ("find_source", "_cifar100_folder"):  # one of them is the first to look
            patch.setattr(datasets, name, remembering(getattr(datasets, name)))
        yield
    assert {path: _state(path) for path in before} == before


def _state(path: Path) -> tuple[int, int, int] | None:
    return (path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_mode) if path.exists() else None


def write(root: Path, paths: list[str], size: tuple[int, int] = (32, 32)) -> Path:
    """Images whose pixels depend on their path alone."""
    for path in paths:
        seed = int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:4], "little")
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    return root


def write_toy(root: Path) -> Path:
    return write(root, list(FILES))


def zipped(folder: Path, archive: Path, lead: str = "") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(folder.rglob("*"), reverse=True):
            out.write(path, lead + path.relative_to(folder).as_posix())
    return archive


def assert_disjoint_and_complete(splits: Splits) -> None:
    assert not set(splits.train.paths) & set(splits.test.paths)
    for images in (splits.train, splits.test):
        assert set(images.labels.tolist()) == set(range(len(splits.class_names)))
        assert len(images.images) == len(images.labels) == len(images.paths)


# ---------------------------------------------------------------------------------------------------------------------------- digits


def test_digits(tmp_path: Path) -> None:
    splits = digits(tmp_path / "nowhere")
    values, targets = (torch.from_numpy(np.asarray(array)) for array in load_digits(return_X_y=True))
    assert_disjoint_and_complete(splits)
    assert (len(splits.train.labels), len(splits.test.labels)) == (1437, 360)
    assert (splits.test.labels.bincount() / targets.bincount() - 0.2).abs().max() < 0.01, "stratified"
    for images in (splits.train, splits.test):
        pixels, sizes = images.images.fetch(torch.arange(len(images.labels)))
        assert pixels.shape == (len(images.labels), 3, 8, 8) and sizes is None
        assert pixels.min() == 0 and pixels.max() == 255 and torch.equal(pixels[:, 0], pixels[:, 2])
    label, row = splits.test.paths[5].split("/")
    assert int(label) == splits.test.labels[5] == targets[int(row)]
    shown = splits.test.images.fetch(torch.tensor([5]))[0][0, 0]
    assert torch.equal((shown.double() / 255 * 16).round().flatten(), values[int(row)])
    assert hash_paths(digits(tmp_path).test.paths) == hash_paths(splits.test.paths)


@pytest.mark.parametrize("load", [digits, cifar100])
def test_sets_with_one_split(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"dataset.split=coda is unknown: {load.__name__} has one split only; leave dataset.split=null"):
        load(tmp_path, split="coda")


# ------------------------------------------------------------------------------------------------------------------------- CIFAR-100


def torchvision_layout(root: Path, toy: Path) -> Path:
    """The toy images as torchvision keeps CIFAR-100: pickled, in an order of their own."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        paths = sorted(
            (toy / part).rglob("*.png"), key=lambda path: hashlib.sha256(path.name.encode() + path.parent.name.encode()).digest()
        )
        data = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1).ravel() for path in paths])
        labels = [CLASSES.index(path.parent.name) for path in paths]
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": labels, "coarse_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CLASSES}))
    return folder


def cifar_layout(layout: str, root: Path, toy: Path) -> Path:
    """Build one of the accepted layouts; returns what `dataset.root` is set to."""
    if layout == "folders":
        shutil.copytree(toy, root)
    elif layout == "folder inside":
        shutil.copytree(toy, root / "CIFAR-100")
    elif layout == "val":
        shutil.copytree(toy, root)
        (root / "test").rename(root / "val")
    elif layout == "zip":
        zipped(toy, root / "cifar100.zip")
    elif layout == "zip, leading folder":
        zipped(toy, root / "images.zip", "cifar100/")
    elif layout == "zip is root":
        return zipped(toy, root / "x.zip", "some/")
    elif layout == "torchvision":
        torchvision_layout(root, toy)
    elif layout == "torchvision is root":
        return torchvision_layout(root, toy)
    else:
        torchvision_layout(root / "build", toy)
        with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as tar:
            tar.add(root / "build" / "cifar-100-python", "cifar-100-python")
        shutil.rmtree(root / "build")
    return root


LAYOUTS = ["folders", "folder inside", "val", "zip", "zip, leading folder", "zip is root", "torchvision", "torchvision is root", "tar.gz"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_cifar100_is_the_same_data_set(layout: str, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    splits = cifar100(cifar_layout(layout, tmp_path / "data", toy))
    expected = cifar100(toy)
    assert_disjoint_and_complete(splits)
    assert splits.class_names == CLASSES and (len(splits.train.labels), len(splits.test.labels)) == (15, 6)
    for found, wanted in ((splits.train, expected.train), (splits.test, expected.test)):
        assert found.paths == wanted.paths and torch.equal(found.labels, wanted.labels)
        rows = torch.arange(len(found.labels))
        assert torch.equal(found.images.fetch(rows)[0], wanted.images.fetch(rows)[0])
    images = {Image.open(toy / path).tobytes(): CLASSES.index(name) for path, (part, name) in FILES.items() if part == "test"}
    for row, label in enumerate(splits.test.labels.tolist()):
        pixels = splits.test.images.fetch(torch.tensor([row]))[0][0].permute(1, 2, 0)
        assert images[pixels.numpy().tobytes()] == label


def test_unpacking_happens_once(tmp_path: Path) -> None:
    root = cifar_layout("tar.gz", tmp_path / "changing", write_toy(tmp_path / "toy"))
    cifar100(root)
    (root / "cifar-100-python.tar.gz").write_bytes(b"no longer read")
    cifar100(root)
    assert sorted(path.name for path in root.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_an_archive_that_may_only_be_read_is_unpacked_in_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cifar_layout("tar.gz", tmp_path / "data", write_toy(tmp_path / "toy"))
    extract = tarfile.TarFile.extractall

    def read_only(self: tarfile.TarFile, path: Path, **options: Any) -> None:
        if root in Path(path).parents:
            raise OSError(errno.EROFS, "Read-only file system")
        extract(self, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", read_only)
    splits = cifar100(root)
    assert [path.name for path in root.iterdir()] == ["cifar-100-python.tar.gz"]
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)  # once is enough
    assert cifar100(root).test.paths == splits.test.paths == cifar100(tmp_path / "toy").test.paths

    def full(self: tarfile.TarFile, path: Path, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    shutil.rmtree(own_cache)
    with pytest.raises(OSError, match="No space left on device"):  # and no word of removing the archive
        cifar100(root)


def test_one_process_downloads_and_the_others_find_what_it_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = cifar_layout("tar.gz", tmp_path / "packed", write_toy(tmp_path / "toy")) / "cifar-100-python.tar.gz"
    downloads = []

    def slow(url: str, path: Path, md5: str) -> None:
        downloads.append(url)
        time.sleep(0.3)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(packed, path)

    monkeypatch.setattr(datasets, "download", slow)
    with ThreadPoolExecutor() as pool:  # a lock of files keeps threads apart as it does processes
        found = list(pool.map(lambda _: cifar100(tmp_path / "empty"), range(3)))
    assert len(downloads) == 1
    assert {tuple(splits.test.paths) for splits in found} == {tuple(cifar100(tmp_path / "toy").test.paths)}


def test_who_waits_for_a_download_that_fails_does_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def failing(url: str, path: Path, md5: str) -> None:
        downloads.append(url)
        time.sleep(0.3)
        raise ConnectionError("nothing arrived")

    monkeypatch.setattr(datasets, "download", failing)

    def fault(_: int) -> str:
        with pytest.raises(FileNotFoundError, match=r"CIFAR-100 is not in .* and cannot be downloaded") as caught:
            cifar100(tmp_path)
        return str(caught.value)

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(fault, range(3)))
    assert len(downloads) == 1 and sum("(nothing arrived)" in text for text in faults) == 1


def test_incomplete_cifar100_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cifar100(write_toy(tmp_path / "data"))
    assert "not all of CIFAR-100; found, and in brackets published: 3 classes (100), 15 train (50000), 6 test (10000)" in caplog.text


def test_too_many_classes_for_cifar100(tmp_path: Path) -> None:
    write(tmp_path / "data", [f"{part}/{label:03d}/0.png" for part in ("train", "test") for label in range(101)], (2, 2))
    with pytest.raises(ValueError, match="holds 101 classes, CIFAR-100 has 100; run your own images with dataset=imagefolder"):
        cifar100(tmp_path / "data")


def test_images_of_another_size_keep_their_names(tmp_path: Path) -> None:
    splits = cifar100(write(tmp_path / "data", list(FILES), (8, 8)))
    assert splits.train.paths[:2] == ["train/apple/0.png", "train/apple/1.png"]


def test_incomplete_folder_of_torchvision(tmp_path: Path) -> None:
    folder = torchvision_layout(tmp_path / "data", write_toy(tmp_path / "toy"))
    (folder / "meta").unlink()
    with pytest.raises(ValueError, match=r"cifar-100-python is incomplete \(it needs the files train, test, meta\); remove it"):
        cifar100(tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(pickle.dumps({"data": os.system}), "it holds posix.system, which is no data"), (b"\x80\x05\x95\xff", "truncated"), (b"", "Ran out")],
)
def test_pickles_that_are_no_data_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    folder = torchvision_layout(tmp_path / "data", write_toy(tmp_path / "toy"))
    (folder / "train").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"cifar-100-python/train is damaged \(.*{reason}.*\); remove .* to download it again, or replace it"
    ):
        cifar100(tmp_path / "data")


@pytest.mark.parametrize("content", [{"data": np.zeros((1, 3072), np.uint8)}, {"fine_labels": [0]}, [1, 2]])
def test_pickles_of_something_else_are_refused(content: object, tmp_path: Path) -> None:
    folder = torchvision_layout(tmp_path / "data", write_toy(tmp_path / "toy"))
    (folder / "test").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"cifar-100-python/test is damaged \(.*\); remove .* to download it again, or replace it"):
        cifar100(tmp_path / "data")


def test_an_archive_with_another_checksum_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = cifar_layout("tar.gz", tmp_path / "data", write_toy(tmp_path / "toy"))
    cifar100(root)
    assert "cifar-100-python.tar.gz is not the published archive: its checksum is another" in caplog.text


@pytest.mark.parametrize("error", [zlib.error("Error -3 while decompressing data"), EOFError("ends\ntoo early")])
def test_a_tar_that_cannot_be_decompressed_is_refused(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise error

    root = cifar_layout("tar.gz", tmp_path / "data", write_toy(tmp_path / "toy"))
    monkeypatch.setattr(tarfile.TarFile, "extractall", damaged)
    reason = " ".join(str(error).split())
    with pytest.raises(ValueError, match=rf"cifar-100-python.tar.gz cannot be unpacked \({reason}\); remove it to download it again"):
        cifar100(root)
    assert [path.name for path in root.iterdir()] == ["cifar-100-python.tar.gz"]


def test_truncated_tar_is_refused(tmp_path: Path) -> None:
    root = cifar_layout("tar.gz", tmp_path / "data", write_toy(tmp_path / "toy"))
    os.truncate(root / "cifar-100-python.tar.gz", 2000)
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz cannot be unpacked \(.*\); remove it to download it again"):
        cifar100(root)
    assert [path.name for path in root.iterdir()] == ["cifar-100-python.tar.gz"]


def test_damaged_image_in_a_zip_is_named(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    (toy / "test" / "bear" / "1.png").write_bytes((toy / "test" / "bear" / "1.png").read_bytes()[:300])
    zipped(toy, tmp_path / "data" / "cifar100.zip")
    with pytest.raises(ValueError, match=r"^image test/bear/1.png in .*cifar100.zip cannot be decoded"):
        cifar100(tmp_path / "data")


@pytest.mark.parametrize("exists", [True, False])
def test_offline_message(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:{port}/cifar-100-python.tar.gz")
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        cifar100(root)
    assert time.monotonic() - start < 5
    first, second, third = str(caught.value).splitlines()
    assert "CIFAR-100 is not in" in first and "refused" in first
    assert "Put cifar-100-python.tar.gz there" in second
    assert "train/<class>/* and test/<class>/*" in third and "dataset.root=" in third
    assert root.exists() is exists and (not exists or list(root.iterdir()) == [])


def test_download_ends_in_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar_layout("tar.gz", tmp_path / "server", write_toy(tmp_path / "toy")) / "cifar-100-python.tar.gz"
    monkeypatch.setattr(datasets.CIFAR100, "url", archive.as_uri())
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    splits = cifar100(tmp_path / "data")
    assert splits.class_names == CLASSES
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


# ------------------------------------------------------------------------------------------------------------------------ ImageNet-R


def renditions(count: int = 10) -> list[str]:
    return [f"{wnid}/art_{number}.jpg" for wnid in WNIDS for number in range(count)]


def write_renditions(root: Path, lead: str = "imagenet-r") -> Path:
    """Pictures of different sizes, in ImageNet-R's layout."""
    for number, path in enumerate(renditions()):
        write(root / lead, [path], (8 + number % 3, 9 + number % 4))
    return root


def test_published_permutation() -> None:
    """The recipe of the split: PyTorch's CPU generator, seed 40, over 30,000 images in folder order."""
    permutation = torch.randperm(30_000, generator=torch.Generator().manual_seed(datasets._INFLORA_SPLIT_SEED))
    assert permutation[:5].tolist() == [22438, 26406, 1191, 17820, 3140]
    assert permutation[24_000:24_005].tolist() == [13315, 264, 12084, 22117, 19642]


@pytest.mark.parametrize("layout", ["imagenet-r", "content", "zip", "tar", "tar is root", "train and test"])
def test_inflora_split_of_a_small_folder(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, root = write_renditions(tmp_path / "build"), tmp_path / "data"
    if layout == "imagenet-r":
        shutil.copytree(images, root)
    elif layout == "content":
        shutil.copytree(images / "imagenet-r", root)
    elif layout == "zip":
        zipped(images, root / "imagenet-r.zip")
    elif layout.startswith("tar"):
        root.mkdir()
        with tarfile.open(root / "imagenet-r.tar", "w") as tar:
            tar.add(images / "imagenet-r", "imagenet-r")
        root = root / "imagenet-r.tar" if layout == "tar is root" else root
    else:  # as the reference leaves them behind: moved into train/ and test/
        for number, path in enumerate(renditions()):
            write(root / ("test" if number % 4 == 0 else "train"), [path], (8, 8))
    splits = imagenet_r(root, split="inflora")
    names = sorted(renditions(), key=lambda path: path.split("/"))
    assert names[:3] == [f"{WNIDS[0]}/art_0.jpg", f"{WNIDS[0]}/art_1.jpg", f"{WNIDS[0]}/art_2.jpg"]
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(40)).tolist()
    assert splits.test.paths == [names[row] for row in sorted(permutation[24:])]
    assert splits.train.paths == [names[row] for row in sorted(permutation[:24])]
    assert splits.class_names == WNIDS
    assert [splits.class_names[label] for label in splits.test.labels] == [path.split("/")[0] for path in splits.test.paths]
    written = tmp_path / ("data" if layout == "train and test" else "build")
    lying = {f"{path.parent.name}/{path.name}": path for path in written.rglob("*.jpg")}
    for part in (splits.train, splits.test):
        for row, path in enumerate(part.paths):
            pixels, sizes = part.images.fetch(torch.tensor([row]))
            height, width = pixels.shape[2:] if sizes is None else sizes[0].tolist()
            assert np.array_equal(pixels[0, :, :height, :width].permute(1, 2, 0), np.asarray(Image.open(lying[path])))
    assert splits.split_id == "inflora (unpublished)"
    assert "the test images are not those of the published split inflora" in caplog.text
    assert "3 classes (200), 24 train (24000), 6 test (6000)" in caplog.text


def test_files_are_listed_in_the_order_of_their_names_as_strings(tmp_path: Path) -> None:
    write(tmp_path / "data", [f"{WNIDS[0]}/art_{number}.jpg" for number in (10, 2, 1, 0)] + [f"{WNIDS[1]}/a.jpg"], (4, 4))
    splits = imagenet_r(tmp_path / "data", split="inflora")
    names = [f"{WNIDS[0]}/art_{number}.jpg" for number in (0, 1, 10, 2)] + [f"{WNIDS[1]}/a.jpg"]
    permutation = torch.randperm(5, generator=torch.Generator().manual_seed(40)).tolist()
    assert splits.test.paths == [names[permutation[4]]]


def test_stratified_split(tmp_path: Path) -> None:
    root = write_renditions(tmp_path / "data")
    splits = imagenet_r(root, split="stratified:42")
    assert_disjoint_and_complete(splits)
    assert splits.split_id == "stratified:42" and splits.test.labels.bincount().tolist() == [2, 2, 2]
    assert imagenet_r(root, split="stratified:42").test.paths == splits.test.paths != imagenet_r(root, split="stratified:1").test.paths


def test_stratified_splits_never_change() -> None:
    labels = torch.tensor([*5 * [0], *6 * [1]] * 2)
    assert [rows.tolist() for rows in datasets._stratified(labels, 1)][1] == [11, 14, 16, 17, 19]
    assert [rows.tolist() for rows in datasets._stratified_by_class(labels, ["ant", "bee"], 1)][1] == [2, 14, 16, 19]


def test_stratified_split_needs_two_images_of_a_class(tmp_path: Path) -> None:
    write(write_renditions(tmp_path / "data"), ["imagenet-r/n09999999/only.jpg"])
    with pytest.raises(ValueError, match=r"dataset.split=stratified:3 needs two images of every class; 1 classes have only one"):
        imagenet_r(tmp_path / "data", split="stratified:3")
    with pytest.raises(ValueError, match=r"dataset.split=stratified:0 needs two images of every class; 1 classes have only one"):
        imagefolder(write(tmp_path / "own", ["ant/1.png", "ant/2.png", "bee/1.png"]), split="stratified:0")


def coda_lists(root: Path, prefix: str = "/somewhere/else/imagenet-r/") -> tuple[list[str], list[str]]:
    """List files with a numbering of their own; returns the names listed for training and for test."""
    numbering = {wnid: label for label, wnid in enumerate(reversed(WNIDS))}
    names = renditions()
    parts = {"train": [name for number, name in enumerate(names) if number % 5], "test": names[::5]}
    for part, listed in parts.items():
        content = {"data": [prefix + name for name in listed], "targets": [numbering[name.split("/")[0]] for name in listed]}
        (root / f"imagenet-r_{part}.yaml").write_text(yaml.safe_dump(content))
    return parts["train"], parts["test"]


def test_coda_split_takes_its_numbering_from_the_lists(tmp_path: Path) -> None:
    root = write_renditions(tmp_path / "data")
    train, test = coda_lists(root)
    splits = imagenet_r(root, split="coda")
    assert_disjoint_and_complete(splits)
    assert (sorted(splits.train.paths), sorted(splits.test.paths)) == (sorted(train), sorted(test))
    assert splits.class_names == WNIDS[::-1]
    assert [splits.class_names[label] for label in splits.train.labels] == [path.split("/")[0] for path in splits.train.paths]
    assert splits.split_id == "coda (unpublished)"


def test_no_image_is_in_both_coda_lists(tmp_path: Path) -> None:
    root = write_renditions(tmp_path / "data")
    train, _ = coda_lists(root)
    listed = yaml.safe_load((root / "imagenet-r_test.yaml").read_text())
    (root / "imagenet-r_test.yaml").write_text(yaml.safe_dump(listed | {"data": [*listed["data"][1:], train[0]]}))
    with pytest.raises(ValueError, match=rf"both list {train[0]}; an image is for training or for testing"):
        imagenet_r(root, split="coda")


def test_bad_coda_lists(tmp_path: Path) -> None:
    root = write_renditions(tmp_path / "data")
    with pytest.raises(
        FileNotFoundError, match=r"needs the list files .* of CODA-Prompt, and .*imagenet-r_train.yaml is missing; put them into"
    ):
        imagenet_r(root, split="coda")
    coda_lists(root)
    listed = yaml.safe_load((root / "imagenet-r_test.yaml").read_text())
    for key, value, message in (
        (
            "data",
            [f"{WNIDS[0]}/none{number}.jpg" for number in range(6)],
            "lists 6 images that are not in dataset.root, n01443537/none0.jpg for one",
        ),
        ("targets", [7] * 6, r"the targets of the imagenet-r list files in .* are not numbered 0..3"),
        ("targets", [0] * 5, "is no list file"),
        ("targets", None, "is no list file: it needs `data`, a list of paths, and `targets`, a label"),
    ):
        (root / "imagenet-r_test.yaml").write_text(yaml.safe_dump(listed | {key: value}))
        with pytest.raises(ValueError, match=message):
            imagenet_r(root, split="coda")


def test_folders_split(tmp_path: Path) -> None:
    for number, path in enumerate(renditions()):
        write(tmp_path / "data" / "imagenet-r" / ("test" if number % 5 == 0 else "train"), [path], (8, 8 + number % 2))
    splits = imagenet_r(tmp_path / "data", split="folders")
    assert_disjoint_and_complete(splits)
    assert splits.test.paths == [f"test/{path}" for path in renditions()[::5]] and splits.split_id == "folders"


def test_missing_imagenet_r(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        imagenet_r(tmp_path, split="inflora")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "imagenet-r/<wnid>/*" in lines[1] and "dataset.root=" in lines[2]
    (tmp_path / "empty" / "imagenet-r" / WNIDS[0]).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="ImageNet-R is not in"):
        imagenet_r(tmp_path / "empty", split="inflora")
    with pytest.raises(FileNotFoundError, match=r"train/<wnid>/[*] and test/<wnid>/[*]"):
        imagenet_r(write_renditions(tmp_path / "data"), split="folders")


def test_data_sets_in_one_folder_are_not_taken_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(write_toy(tmp_path / "build"), tmp_path / "one" / "cifar100.zip")
    for root in (tmp_path / "one", write_toy(tmp_path / "data")):
        for split in ("inflora", "folders"):
            with pytest.raises(FileNotFoundError, match="ImageNet-R is not in"):
                imagenet_r(root, split=split)
    renditions_again = [f"{part}/{path}" for part in ("train", "test") for path in renditions()]
    zipped(write(tmp_path / "build r", renditions_again, (8, 8)), tmp_path / "other" / "imagenet-r.zip")

    def offline(*_: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "download", offline)
    with pytest.raises(FileNotFoundError, match="CIFAR-100 is not in"):
        cifar100(tmp_path / "other")


@pytest.mark.parametrize("split", [None, "random", "stratified", "stratified:x"])
def test_unknown_split_of_imagenet_r(split: str | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"dataset.split={split} is unknown; choose inflora, coda, folders or stratified:<seed>"):
        imagenet_r(tmp_path, split=split)  # type: ignore[arg-type]


def test_splits_share_the_decoded_images_and_leave_an_index(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_renditions(tmp_path / "data")
    splits = imagenet_r(root, split="inflora")
    monkeypatch.setattr(cache, "_decode_one", None)
    imagenet_r(root, split="stratified:0")
    (index,) = (own_cache / "splits").glob(f"imagenet_r-{hash_paths(splits.test.paths)[:12]}.csv")
    rows = [line.split(",") for line in index.read_text().splitlines()]
    assert rows[0] == ["split", "path"] and len(rows) == 31
    assert [path for part, path in rows[1:] if part == "test"] == splits.test.paths


# ------------------------------------------------------------------------------------------------------------------------- DomainNet

DOMAINS = ["clipart", "infograph", "painting", "real", "sketch"]


def drawings() -> list[str]:
    """As they are called there: two classes in five domains, three images of each."""
    classes = {"aircraft_carrier": 1, "zigzag": 345}
    pairs = itertools.product(DOMAINS, classes.items(), range(3))
    return [f"{domain}/{name}/{domain}_{number:03d}_{image:06d}.jpg" for domain, (name, number), image in pairs]


def domainnet_lists(root: Path) -> tuple[list[str], list[str]]:
    """List files with zigzag before the aircraft carrier; returns the names listed for training and for test."""
    names = drawings()
    parts = {"train": [name for number, name in enumerate(names) if number % 3], "test": names[::3]}
    for part, listed in parts.items():
        content = {"data": [f"data/domainnet/{name}" for name in listed], "targets": [int("zigzag" not in name) for name in listed]}
        (root / f"domainnet_{part}.yaml").write_text(yaml.safe_dump(content))
    return parts["train"], parts["test"]


@pytest.mark.parametrize("layout", ["domainnet", "content", "zip"])
def test_domainnet_takes_its_numbering_from_the_lists_and_leaves_quickdraw(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write(tmp_path / "build", [*drawings(), "quickdraw/zigzag/quickdraw_345_000000.png"], (8, 9))
    root = images if layout == "content" else tmp_path / "data"
    if layout == "domainnet":
        shutil.copytree(images, root / "domainnet")
    elif layout == "zip":
        zipped(images, root / "DomainNet.zip")
    train, test = domainnet_lists(root)
    splits = domainnet(root, split="coda")
    assert_disjoint_and_complete(splits)
    assert (sorted(splits.train.paths), sorted(splits.test.paths)) == (sorted(train), sorted(test))
    assert splits.class_names == ["zigzag", "aircraft_carrier"] and splits.split_id == "coda"
    for part in (splits.train, splits.test):
        assert [splits.class_names[label] for label in part.labels] == [path.split("/")[1] for path in part.paths]
        for row, path in enumerate(part.paths):
            pixels, _ = part.images.fetch(torch.tensor([row]))
            assert np.array_equal(pixels[0].permute(1, 2, 0), np.asarray(Image.open(tmp_path / "build" / path)))
    assert "2 classes (345), 20 train (338808), 10 test (84702)" in caplog.text


def test_domainnet_without_its_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "data", drawings(), (8, 9))
    with pytest.raises(FileNotFoundError, match=r"list files domainnet_train.yaml and domainnet_test.yaml of CODA-Prompt, and .* is"):
        domainnet(root, split="coda")
    splits = domainnet(root, split="stratified:1")
    assert_disjoint_and_complete(splits)
    assert splits.class_names == ["aircraft_carrier", "zigzag"] and splits.test.labels.bincount().tolist() == [3, 3]
    assert "published" not in caplog.text
    with pytest.raises(ValueError, match=r"dataset.split=folders is unknown; choose coda or stratified:<seed>"):
        domainnet(root, split="folders")


def test_missing_domainnet(tmp_path: Path) -> None:
    root = write(tmp_path / "data", [name for name in drawings() if not name.startswith("sketch/")], (8, 9))
    with pytest.raises(FileNotFoundError) as caught:
        domainnet(root, split="coda")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "domainnet/<domain>/<class>/*" in lines[1] and "dataset.root=" in lines[2]
    for domain in DOMAINS:
        (tmp_path / "empty" / domain).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="DomainNet is not in"):
        domainnet(tmp_path / "empty", split="coda")
    write(root, ["sketch/sketch_001_000001.jpg"], (8, 9))
    with pytest.raises(ValueError, match=r"needs <domain>/<class>/[*], but sketch/sketch_001_000001.jpg does not lie so"):
        domainnet(root, split="coda")


# ----------------------------------------------------------------------------------------------------------------------- own folders


@pytest.mark.parametrize("layout", ["folders", "val", "folder inside", "zip"])
def test_own_train_and_test_folders(layout: str, tmp_path: Path) -> None:
    toy, root = write(tmp_path / "toy", list(FILES), (6, 7)), tmp_path / "data"
    if layout == "zip":
        zipped(toy, root / "my.zip", "lead/")
    else:
        shutil.copytree(toy, root / "flowers" if layout == "folder inside" else root)
        if layout == "val":
            (root / "test").rename(root / "val")
    splits = imagefolder(root)
    assert_disjoint_and_complete(splits)
    assert splits.class_names == CLASSES and splits.split_id == "folders"
    assert splits.train.paths == [path for path, (part, _) in FILES.items() if part == "train"]
    assert splits.test.paths == [path for path, (part, _) in FILES.items() if part == "test"]
    image = splits.train.images.fetch(torch.tensor([6]))[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(image, np.asarray(Image.open(toy / splits.train.paths[6])))
    with pytest.raises(ValueError, match=r"dataset.split=stratified:1 does not fit .*, which has train and test folders; choose null"):
        imagefolder(root, split="stratified:1")


@pytest.mark.parametrize("archive", [False, True])
def test_class_folders_alone_are_split(archive: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = write(tmp_path / "data", [f"{name}/{number}.png" for name in CLASSES for number in range(10)], (3, 3))
    if archive:
        root = zipped(root, tmp_path / "zips" / "my.zip", "lead/")
    splits = imagefolder(root)
    assert_disjoint_and_complete(splits)
    assert splits.split_id == "stratified:0" and splits.test.labels.bincount().tolist() == [2, 2, 2]
    assert "has no train and test folders: using dataset.split=stratified:0" in caplog.text
    assert imagefolder(root, split="stratified:0").test.paths == splits.test.paths != imagefolder(root, split="stratified:5").test.paths


def test_further_classes_leave_the_split_of_the_others_as_it_was(tmp_path: Path) -> None:
    paths = [f"{label:02d}/{number}.png" for label in range(20) for number in range(11 + label % 7)]
    before = imagefolder(write(tmp_path / "few", paths, (2, 2)))
    after = imagefolder(
        write(tmp_path / "more", paths + [f"{label}/{number}.png" for label in range(20, 30) for number in range(9)], (2, 2))
    )
    assert after.test.paths[: len(before.test.paths)] == before.test.paths
    assert after.train.paths[: len(before.train.paths)] == before.train.paths


def test_class_names_may_be_any_the_system_has(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    root = write(tmp_path / "data", [f"{name}/{number}.png" for name in ("a", odd) for number in range(5)], (3, 3))
    splits = imagefolder(root)
    assert splits.class_names == ["a", odd]
    loading = Loading(torch.device("cpu"), batch_size=2, eval_batch_size=2, seed=0)
    tasks = TaskSequence(
        splits, class_order=[0, 1], task_sizes=[1, 1], transforms=build_transforms("shift", 3), loading=loading, max_train_per_class=2
    )
    assert [task.class_names for task in tasks] == [["a"], [odd]]


def test_class_folders_without_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "data", [f"{name}/{number}.png" for name in "ac" for number in range(5)], (3, 3))
    (root / "b").mkdir()
    (root / "b" / "1.gif").write_bytes(b"GIF89a")
    assert imagefolder(root).class_names == ["a", "c"]
    assert "1 folders hold no image (.jpg" in caplog.text and "b for one" in caplog.text


def test_few_images_of_many_classes_can_be_split(tmp_path: Path) -> None:
    root = write(tmp_path / "data", [f"{label}/{number}.png" for label in range(9) for number in range(2)], (3, 3))
    assert_disjoint_and_complete(imagefolder(root))
    assert split_task_sizes(9, 5) == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "dataset.root=.* holds no image folders; it needs train/<class>/[*] and test/<class>/[*], or only <class>/[*], or a zip"),
        (["a.png", "b.png"], "holds no image folders"),
        (
            ["train/a/1.png", "extra/b/1.png"],
            "a folder train, but neither test nor val; add one, or set dataset.root=.*/data/train to",
        ),
        (
            ["train/1.png", "train/a/1.png", "test/a/1.png"],
            "needs train/<class>/[*] and test/<class>/[*], but train/1.png lies in no class folder",
        ),
        (["train/a/1.png", "test/a/notes.txt"], "but train or test has no images"),
        (["Train/a/1.png", "Train/a/2.png", "Test/a/1.png", "Test/a/2.png"], "has the folders Test, Train; call them train and test, or"),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], "has test images of 1 classes without training images, b for one"),
    ],
)
def test_folders_that_are_no_data_set(paths: list[str], message: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(root, [path for path in paths if path.endswith("png")], (2, 2))
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        imagefolder(root)


def test_missing_root_and_unknown_split_of_own_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset.root=.*nowhere does not exist; set it to a folder with train/<class>"):
        imagefolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dataset.split=half is unknown; choose stratified:<seed>, or null"):
        imagefolder(tmp_path, split="half")


# --------------------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "conf" / "dataset").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_name_what_exists(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_" and second.startswith("# "), "the second line is shown by --help"
    keys = yaml.safe_load(path.read_text())["dataset"]
    assert set(keys) == {field.name for field in dataclasses.fields(DatasetConfig)}
    module, _, function = keys["_target_"].rpartition(".")
    assert module == "inflora.data.datasets"
    assert set(inspect.signature(getattr(datasets, function)).parameters) == {"root", "split"} | set(keys["options"])
    build_transforms(keys["transform"], 32)
    num_classes = {"digits": 10, "cifar100": 100, "imagenet_r": 200, "domainnet": 345}.get(function, 20)
    assert len(set(split_task_sizes(num_classes, keys["num_tasks"], keys["task_sizes"]))) == 1
    assert keys["class_order"] == "natural" and keys["validation_fraction"] == 0 and keys["image_size"] is None
    if function in ("cifar100", "imagenet_r", "domainnet"):
        assert path.stem == f"{function}_{keys['num_tasks']}task" and keys["normalize"] == "none"


# ------------------------------------------------------------------------------------------------------------------------- real data


def real_data() -> Path:
    folder = os.environ.get("INFLORA_TEST_DATA")
    if not folder:
        pytest.skip("needs real images: set INFLORA_TEST_DATA to a folder that holds cifar100.zip or imagenet-r")
    return Path(folder)


@pytest.mark.data
def test_real_cifar100() -> None:
    splits = cifar100(real_data())
    assert splits.train.labels.bincount().tolist() == [500] * 100 and splits.test.labels.bincount().tolist() == [100] * 100
    assert (splits.class_names[0], splits.class_names[20], splits.class_names[99]) == ("apple", "chair", "worm")
    assert hash_paths(splits.test.paths) == "e3341335bd181d86e24c57ccb32bb3f409c6246ecacba04394bddd5dda0b2816"


@pytest.mark.data
def test_real_imagenet_r(caplog: pytest.LogCaptureFixture) -> None:
    if not any((real_data() / name).exists() for name in ("imagenet-r", "imagenet-r.tar", "imagenet-r.zip")):
        pytest.skip("needs imagenet-r in INFLORA_TEST_DATA")
    splits = imagenet_r(real_data(), split="inflora")
    assert hash_paths(splits.test.paths) == "524afde876563993d1e8ce5e38b638a0b394adb503ce7d09b0576ac5522dd3dd"
    assert hash_paths(splits.train.paths) == "fc8d1d8a69c9f9548de5a3825625c953ecb6e461000dc28632c732801ba3417c"
    assert splits.split_id == "inflora" and not caplog.text
    counts = splits.test.labels.bincount().view(10, 20).sum(1).tolist()
    assert counts == [698, 688, 433, 563, 724, 560, 591, 423, 621, 699]
