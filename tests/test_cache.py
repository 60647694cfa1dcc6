"""Stores of decoded images, and the cache on disk."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inflora.data import cache
from inflora.data.cache import SHARE_OF_DISK, EncodedImages, FixedImages, ImageStore, Rows, VariableImages, cache_folder, decoded, map_ahead
from inflora.data.datasets import imagefolder
from inflora.data.sources import FolderSource
from inflora.data.tasks import Loading, TaskSequence
from inflora.data.transforms import build_transforms


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Random images of these heights and widths as PNG files below folder/class; returns their pixels (H, W, 3)."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "class" / f"{number:03d}.png")
    return pixels


def load(folder: Path) -> ImageStore:
    return decoded(FolderSource(folder, ["class"]), "toy")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def assert_holds(store: ImageStore, pixels: list[np.ndarray]) -> None:
    assert len(store) == len(pixels)
    assert store.nbytes == sum(image.size for image in pixels)
    rows = torch.arange(len(pixels)).flip(0)
    images, sizes = store.fetch(rows)
    assert images.dtype == torch.uint8
    for number, row in enumerate(rows.tolist()):
        height, width = pixels[row].shape[:2]
        if sizes is not None:
            assert sizes[number].tolist() == [height, width] and store.sizes is not None
            assert store.sizes[row].tolist() == [height, width]
        assert np.array_equal(images[number, :, :height, :width].permute(1, 2, 0).numpy(), pixels[row])
        assert int(images[number, :, height:].sum()) + int(images[number, :, :, width:].sum()) == 0, "padding is zero"


ONE_SIZE = [(5, 4)] * 70
MANY_SIZES = [(5, 4), (3, 9), (1, 1), (8, 2)] * 20


def refuse(*args: object) -> None:
    raise AssertionError("looked at a second time")


@pytest.mark.parametrize("sizes", [ONE_SIZE, MANY_SIZES], ids=["one size", "many sizes"])
def test_decoded_once(sizes: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write(tmp_path / "images", sizes)
    store = load(tmp_path / "images")
    assert isinstance(store, FixedImages if sizes is ONE_SIZE else VariableImages)
    assert_holds(store, pixels)
    monkeypatch.setattr(cache, "_decode_one", refuse)
    assert_holds(load(tmp_path / "images"), pixels)


def test_changed_source_is_decoded_anew_and_the_old_copy_dropped(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "images", ONE_SIZE[:2])
    load(tmp_path / "images")
    pixels = write(tmp_path / "images", ONE_SIZE[:3])
    assert_holds(load(tmp_path / "images"), pixels)
    assert len(entries(own_cache)) == 1
    write(tmp_path / "elsewhere", ONE_SIZE[:2])
    load(tmp_path / "elsewhere")
    assert len(entries(own_cache)) == 2, "another source's copy stays"


@pytest.mark.parametrize("damage", ["shorten", "no sizes", "garbage"])
def test_damaged_entry_is_decoded_anew(damage: str, tmp_path: Path, own_cache: Path) -> None:
    pixels = write(tmp_path / "images", ONE_SIZE[:3])
    load(tmp_path / "images")
    (entry,) = entries(own_cache)
    if damage == "shorten":
        os.truncate(entry / "pixels.bin", 10)
    elif damage == "no sizes":
        (entry / "sizes.npy").unlink()
    else:
        (entry / "sizes.npy").write_bytes(b"garbage")
    assert_holds(load(tmp_path / "images"), pixels)
    assert entries(own_cache) == [entry]


def test_one_decodes_while_the_others_wait(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write(tmp_path / "images", ONE_SIZE[:3])
    decode, decoded_paths = cache._decode_one, []

    def slowly(source: FolderSource, path: str) -> np.ndarray:
        decoded_paths.append(path)
        time.sleep(0.05)
        return decode(source, path)

    monkeypatch.setattr(cache, "_decode_one", slowly)
    for store in map_ahead(lambda _: load(tmp_path / "images"), range(3), num_threads=3, ahead=3):
        assert_holds(store, pixels)
    assert len(decoded_paths) == 3
    assert len(entries(own_cache)) == 1


def test_an_added_class_leaves_no_older_copy(tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "images", ONE_SIZE[:3])
    load(tmp_path / "images")
    (before,) = entries(own_cache)
    shutil.copytree(tmp_path / "images" / "class", tmp_path / "images" / "other")
    assert len(decoded(FolderSource(tmp_path / "images", ["class", "other"]), "toy")) == 6
    (after,) = entries(own_cache)
    assert after != before


def test_a_copy_that_cannot_be_opened_now_is_not_thrown_away(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "images", ONE_SIZE[:3])
    load(tmp_path / "images")
    (entry,) = entries(own_cache)

    def no_memory(*args: object, **options: object) -> None:
        assert options["mode"] == "r", "another kind would need as much memory as the file is large"
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Cannot allocate memory"):
        patch.setattr(np, "memmap", no_memory)
        load(tmp_path / "images")
    assert entries(own_cache) == [entry] and (entry / "pixels.bin").exists()


def test_large_images_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, jobs = write(tmp_path / "images", MANY_SIZES), []
    ahead = cache.map_ahead
    monkeypatch.setattr(cache, "DECODE_BYTES", 3 * pixels[0].nbytes)
    monkeypatch.setattr(cache, "map_ahead", lambda work, chunks, *numbers: jobs.extend(map(len, chunks)) or ahead(work, chunks, *numbers))
    assert_holds(load(tmp_path / "images"), pixels)
    assert max(jobs) == 3 and sum(jobs) == len(pixels)


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, own_cache: Path) -> None:
    pixels = write(tmp_path / "images", ONE_SIZE[:3])
    load(tmp_path / "images")
    (entry,) = entries(own_cache)
    entry.rename(own_cache / f".{entry.name.rpartition('-')[0]}.partial")
    assert_holds(load(tmp_path / "images"), pixels)
    assert entries(own_cache) == [entry] and not list(own_cache.glob("*.partial"))


@pytest.mark.parametrize("sizes", [ONE_SIZE, MANY_SIZES], ids=["one size", "many sizes"])
def test_cache_that_cannot_be_written(
    sizes: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = write(tmp_path / "images", sizes)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INFLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert_holds(load(tmp_path / "images"), pixels)
    assert "decoding into memory for this run; set INFLORA_CACHE to a writable folder" in caplog.text
    caplog.clear()
    monkeypatch.setattr(cache, "_memory_bytes", lambda: 0)
    store = load(tmp_path / "images")
    assert isinstance(store, EncodedImages) and "decoding into memory" not in caplog.text
    assert_holds(store, pixels)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
def test_full_disk(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "images", ONE_SIZE[:3])
    decode = cache._decode

    def full(source: FolderSource, file: object) -> np.ndarray:
        with open("/dev/full", "wb") as disk:
            return decode(source, disk)

    monkeypatch.setattr(cache, "_decode", full)
    with pytest.raises(OSError, match=r"the disk of the image cache .*cache is full: free some space there, or set INFLORA_CACHE"):
        load(tmp_path / "images")
    assert entries(own_cache) == [], "nothing incomplete is left"


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


@pytest.mark.parametrize("sizes", [ONE_SIZE, MANY_SIZES], ids=["one size", "many sizes"])
def test_what_would_fill_the_disk_is_decoded_whenever_it_is_read(
    sizes: list[tuple[int, int]], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = write(tmp_path / "data", sizes)
    needed = sum(image.size for image in pixels)
    disk_with(monkeypatch, int(needed / SHARE_OF_DISK) - 1)
    caplog.set_level("INFO")
    store = load(tmp_path / "data")
    assert isinstance(store, EncodedImages) and "they are decoded whenever they are read, by trainer.num_workers threads" in caplog.text
    assert_holds(store, pixels)
    (entry,) = entries(own_cache)
    assert [file.name for file in entry.iterdir()] == ["sizes.npy"]

    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_open_image", refuse)
        again = load(tmp_path / "data")
    assert isinstance(again, EncodedImages), "without looking at the files"
    assert "they are decoded whenever they are read" in caplog.text
    assert_holds(again, pixels)

    disk_with(monkeypatch, int(needed / SHARE_OF_DISK) + 1)
    store = load(tmp_path / "data")
    assert not isinstance(store, EncodedImages), "now there is space"
    assert_holds(store, pixels)
    disk_with(monkeypatch, 0)
    assert not isinstance(load(tmp_path / "data"), EncodedImages), "they are decoded already"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sizes", [ONE_SIZE, MANY_SIZES], ids=["one size", "many sizes"])
def test_a_run_sees_the_same_images_whenever_they_are_decoded(
    sizes: list[tuple[int, int]], num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write(tmp_path / "data" / f"class {number}", sizes)
    passes = []
    for free in (10**9, 0):
        disk_with(monkeypatch, free)
        monkeypatch.setenv("INFLORA_CACHE", str(tmp_path / f"cache {free}"))
        splits = imagefolder(tmp_path / "data")
        assert isinstance(splits.train.images._store, EncodedImages) == (free == 0)  # type: ignore[attr-defined]
        loading = Loading(torch.device("cpu"), batch_size=16, eval_batch_size=16, seed=0, num_workers=num_workers)
        transforms = build_transforms("inflora", 16, None, None)
        sequence = TaskSequence(splits, class_order=[0, 1], task_sizes=[1, 1], transforms=transforms, loading=loading)
        task = sequence[1]
        passes.append([*task.batches("train", stream="train"), *task.test_batches(), (task.raw(torch.arange(20))[0], task.num_train)])
    for (x, y), (other_x, other_y) in zip(*passes, strict=True):
        assert torch.equal(x, other_x) and torch.equal(torch.as_tensor(y), torch.as_tensor(other_y))


def test_an_estimate_that_is_too_high_costs_one_run_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write(tmp_path / "data", [(50, 50), *[(1, 1)] * 9])
    monkeypatch.setattr(cache, "ESTIMATED_FROM", 1)
    disk_with(monkeypatch, 10_000)
    assert isinstance(load(tmp_path / "data"), EncodedImages)
    store = load(tmp_path / "data")
    assert not isinstance(store, EncodedImages), "their sizes are known now"
    assert_holds(store, pixels)


def test_an_earlier_state_makes_room_for_the_next(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", MANY_SIZES)
    load(tmp_path / "data")
    write(tmp_path / "data", ONE_SIZE)
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 0 if list(own_cache.glob("*/pixels.bin")) else 10**9)
    )
    assert not isinstance(load(tmp_path / "data"), EncodedImages)


def test_damaged_images_are_named_before_a_run_that_decodes_them_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", MANY_SIZES)
    whole = (tmp_path / "data" / "class" / "003.png").read_bytes()
    (tmp_path / "data" / "class" / "003.png").write_bytes(whole[: len(whole) // 2])
    disk_with(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"image class/003\.png in .*data cannot be decoded"):
        load(tmp_path / "data")
    (tmp_path / "data" / "class" / "003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image class/003\.png in .*data cannot be decoded \(not an image Pillow knows\)"):
        load(tmp_path / "data")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_image_is_named(damage: str, suffix: str, tmp_path: Path, own_cache: Path) -> None:
    write(tmp_path / "images", ONE_SIZE[:3])
    path = tmp_path / "images" / "class" / f"001_bad.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(
        ValueError, match=rf"^image class/001_bad\.{suffix} in .*images cannot be decoded \(.+\); replace or remove it"
    ) as caught:
        load(tmp_path / "images")
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)
    assert entries(own_cache) == [], "nothing incomplete is left"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "class").mkdir(parents=True)
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    image.save(tmp_path / "images" / "class" / ("0.tif" if mode == "CMYK" else "0.png"))
    images, _ = load(tmp_path / "images").fetch(torch.tensor([0]))
    assert images.shape == (1, 3, 3, 4) and int(images.min()) == 255


def test_rows_are_a_view(tmp_path: Path) -> None:
    for sizes in (ONE_SIZE, MANY_SIZES):
        pixels = write(tmp_path / str(len(sizes)), sizes)
        rows = [7, 3, 11]
        assert_holds(Rows(load(tmp_path / str(len(sizes))), torch.tensor(rows)), [pixels[row] for row in rows])


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("INFLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "inflora"


def test_map_ahead_keeps_the_order_and_its_distance() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.002 if item % 3 == 0 else 0)
        return item * item

    results = map_ahead(work, range(30), num_threads=4, ahead=5)
    for item, result in enumerate(results):
        assert result == item * item
        assert max(started) <= item + 5
    assert sorted(started) == list(range(30))


def test_map_ahead_stops_when_left() -> None:
    release = threading.Event()
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item:
            release.wait(5)
        return item

    results = map_ahead(work, range(100), num_threads=1, ahead=8)
    assert next(results) == 0
    release.set()
    results.close()  # type: ignore[attr-defined]
    assert len(started) < 12


def test_map_ahead_passes_errors_on() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = map_ahead(work, range(10), num_threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_of_a_pgm_of_16_bits_the_upper_eight_are_kept(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    (tmp_path / "images" / "class").mkdir(parents=True)
    (tmp_path / "images" / "class" / "deep.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    images, _ = load(tmp_path / "images").fetch(torch.tensor([0]))
    assert images[0, 0].tolist() == [[0, 0, 1], [0x12, 0xFF, 0xFF]]


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_of_sixteen_bits_the_upper_eight_are_kept(kind: str, tmp_path: Path) -> None:
    values = np.arange(0, 65536, 4096).reshape(4, 4)
    (tmp_path / "class").mkdir()
    Image.fromarray(values.astype(kind)).save(tmp_path / "class" / "0.tif")
    (pixels,), _ = load(tmp_path).fetch(torch.tensor([0]))
    assert (pixels.numpy() == values >> 8).all()


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "class" / "0.tif")
    with pytest.raises(ValueError, match=r"image class/0.tif in .* \(its pixels are 32-bit numbers; save it with 8 or 16 bits\)"):
        load(tmp_path)
