"""Where images are looked for, in folders, zips and tars."""

import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from inflora.data.sources import Source, find_source


def write(folder: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / path)
    return folder


def pack(folder: Path, archive: Path, lead: str = "") -> Path:
    """A zip or tar of a folder's content, below the leading folder `lead`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted(folder.rglob("*")):
                out.write(path, f"{lead}{path.relative_to(folder)}")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as out:
            out.add(folder, lead or ".")
    return archive


def two_folders(folders: set[str]) -> list[str]:
    return sorted({"a", "b"} & folders) if {"a", "b"} <= folders else []


def find(root: Path, name: str = "toy") -> Source:
    source = find_source(root, name, two_folders)
    assert source is not None
    return source


@pytest.mark.parametrize(
    "place",
    ["root", "root/Toy-Set", "root/x_toy.zip", "root/anything.zip", "root/toy.tar", "root/anything.tar"],
)
@pytest.mark.parametrize("lead", ["", "lead/"])
def test_places_that_are_looked_at(place: str, lead: str, tmp_path: Path) -> None:
    images = write(tmp_path / "images", "a/10.png", "a/9.png", "b/x.JPG", "b/deep/z.png", "b/notes.png/y.bmp", "c/other.png")
    (images / "a" / "notes.txt").write_text("no image")
    write(images, ".hidden/a.png", "a/._9.png", "a/.thumbs/9.png", "__MACOSX/a/9.png")
    location = tmp_path / place
    if location.suffix:
        pack(images, location, lead)
    else:
        location.parent.mkdir(exist_ok=True)
        images.rename(location)
    (tmp_path / "root" / "unrelated").mkdir(exist_ok=True)
    source = find(tmp_path / "root")
    assert source.location == location
    assert source.paths == ["a/10.png", "a/9.png", "b/x.JPG", "b/deep/z.png", "b/notes.png/y.bmp"]
    assert source.read("a/9.png")[:4] == b"\x89PNG" and source.read("a/9.png") != source.read("a/10.png")
    assert find(location).paths == source.paths, "the place itself may be the root"


def test_what_is_called_right_comes_before_the_only_one(tmp_path: Path) -> None:
    images = write(tmp_path / "images", "a/1.png", "b/1.png")
    pack(images, tmp_path / "root" / "other.zip")
    assert find(tmp_path / "root").location.name == "other.zip"
    pack(images, tmp_path / "root" / "the-toy.zip")
    assert find(tmp_path / "root").location.name == "the-toy.zip"
    (tmp_path / "root" / "the-toy.zip").rename(tmp_path / "root" / "third.zip")
    assert find_source(tmp_path / "root", "toy", two_folders) is None, "two archives, neither called so"


def test_an_only_folder_of_another_name_is_looked_into_only_without_a_name(tmp_path: Path) -> None:
    write(tmp_path / "flowers", "a/1.png", "b/1.png")
    assert find_source(tmp_path, "toy", two_folders) is None
    assert find(tmp_path, "").location == tmp_path / "flowers"


def test_nothing_there(tmp_path: Path) -> None:
    assert find_source(tmp_path / "missing", "toy", two_folders) is None
    assert find_source(tmp_path, "toy", two_folders) is None


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    before = find(tmp_path)
    assert find(tmp_path).fingerprint == before.fingerprint
    os.utime(tmp_path / "a/1.png", (1, 1))
    touched = find(tmp_path)
    write(tmp_path, "a/2.png")
    added = find(tmp_path)
    assert len({before.fingerprint, touched.fingerprint, added.fingerprint}) == 3
    assert before.identity == touched.identity == added.identity


@pytest.mark.parametrize("name", ["toy.zip", "toy.tar"])
def test_broken_archive(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not an archive at all" * 50)
    with pytest.raises(ValueError, match=rf"{name} is not a readable zip or uncompressed tar file .*; replace it, or set dataset.root"):
        find(tmp_path)


def test_an_archive_of_something_else_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "other.zip").write_bytes(b"half downloaded")
    assert find_source(tmp_path, "toy", two_folders) is None
    with pytest.raises(ValueError, match=r"other\.zip is not a readable zip"):
        find(tmp_path / "other.zip")  # the user named it
    with pytest.raises(ValueError, match=r"other\.zip is not a readable zip"):
        find_source(tmp_path, "", two_folders)  # there is nothing else it could be


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    archive = pack(write(tmp_path / "images", "a/1.png", "b/1.png"), tmp_path / "toy.tar.gz")
    with pytest.raises(ValueError, match=r"toy\.tar\.gz is not a readable zip or uncompressed tar file"):
        find(archive)


def test_links_in_a_tar_are_the_files_they_lead_to(tmp_path, caplog):
    folder = write(tmp_path / "toy", "a/1.png", "b/1.png")
    os.link(folder / "a" / "1.png", folder / "a" / "2.png")  # of a file with two names a tar holds the second as a link
    (folder / "b" / "2.png").symlink_to("../a/1.png")
    (folder / "b" / "3.png").symlink_to("2.png")
    source = find(pack(folder, tmp_path / "toy.tar"))
    assert source.paths == ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"]
    first = (folder / "a" / "1.png").read_bytes()
    assert [source.read(path) == first for path in source.paths] == [True, True, False, True, True]
    assert not caplog.records
    (folder / "b" / "4.png").symlink_to("nowhere.png")
    (folder / "b" / "5.png").symlink_to("5.png")
    assert find(pack(folder, tmp_path / "toy.tar")).paths == source.paths
    (record,) = caplog.records
    assert "2 links to images lead to no file in it, and are left out, b/4.png for one" in record.message


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    """All images of all classes would be found in it, again and again."""
    folder = write(tmp_path / "toy", "a/1.png", "b/1.png")
    (folder / "a" / "loop").symlink_to("..")
    (folder / "b" / "more").symlink_to(write(tmp_path / "elsewhere", "2.png"))
    assert find(folder).paths == ["a/1.png", "b/1.png", "b/more/2.png"]


def test_links_that_lead_nowhere_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    assert find(tmp_path).paths == ["a/1.png", "b/1.png"]
    assert "1 links to images lead to no file, and are left out, a/2.png for one" in caplog.text


def test_a_zip_whose_names_begin_with_a_dot(tmp_path: Path) -> None:
    write(tmp_path / "images", "a/1.png", "b/1.png")
    source = find(pack(tmp_path / "images", tmp_path / "root" / "toy.zip", "./"))
    assert source.paths == ["a/1.png", "b/1.png"]
    assert source.read("b/1.png") == (tmp_path / "images" / "b" / "1.png").read_bytes()


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_replaced_in_place_is_another_source(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "images", "a/1.png", "b/1.png")
    archive = pack(tmp_path / "images", tmp_path / f"toy{suffix}")
    before = find(archive)
    os.utime(archive, ns=(0, 0))
    after = find(archive)
    assert after.identity == before.identity and after.fingerprint != before.fingerprint


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refusing(path: str | Path) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        find(tmp_path)
