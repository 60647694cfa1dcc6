"""Where image files lie: a folder, a zip or a tar, all seen as a list of relative paths that can be read."""

import hashlib
import logging
import os
import posixpath
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
ARCHIVE_SUFFIXES = (".zip", ".tar")

Accept = Callable[[set[str]], list[str]]
"""Given the folder names at one level, those that hold the data set; empty: not this level."""


class Source(ABC):
    """The image files below one folder, or below one folder of an archive. Nothing is ever written there.

    Attributes:
        location: the folder or archive.
        paths: the images' paths with forward slashes, sorted by folder, then by file name as strings (torchvision's ImageFolder order).
        fingerprint: changes when a file is added, removed, resized or touched.
        identity: names the place, whatever is in it.
    """

    def __init__(self, location: Path, base: str, folders: list[str], stamps: dict[str, tuple[int, int]]) -> None:
        """Args:
        base: the folder inside an archive that `paths` are relative to; "" for none.
        folders: the folders below the base that were listed.
        stamps: per image path, its size and time of change.
        """
        self.location = location
        self.paths = sorted(stamps, key=lambda path: path.rpartition("/"))
        self.identity = _digest([str(location.resolve()), base, str("train" in folders)])  # not the classes: some may be added
        self.fingerprint = _digest([self.identity, *(f"{path} {stamps[path]}" for path in self.paths)])

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of one image file; safe to call from several threads."""


class FolderSource(Source):
    """Images in `folders` below a folder, at any depth."""

    def __init__(self, location: Path, folders: list[str]) -> None:
        stamps, without_file, without_image = {}, [], []
        for folder in folders:
            for parent, subfolders, files in os.walk(location / folder, onerror=_refuse, followlinks=True):
                subfolders[:] = [name for name in subfolders if not _is_hidden(name) and not _leads_back(os.path.join(parent, name))]
                prefix = Path(parent).relative_to(location).as_posix()
                images = list(filter(is_image, files))
                if not images and not subfolders:
                    without_image.append(prefix)
                for name in images:
                    try:
                        stat = os.stat(os.path.join(parent, name))
                    except FileNotFoundError:
                        without_file.append(f"{prefix}/{name}")
                    else:
                        stamps[f"{prefix}/{name}"] = (stat.st_size, stat.st_mtime_ns)
        if without_file:
            log.warning(
                "%s: %d links to images lead to no file, and are left out, %s for one", location, len(without_file), without_file[0]
            )
        if without_image:
            kinds = " ".join(IMAGE_SUFFIXES)
            log.warning("%s: %d folders hold no image (%s), %s for one", location, len(without_image), kinds, without_image[0])
        super().__init__(location, "", folders, stamps)

    def read(self, path: str) -> bytes:
        return (self.location / path).read_bytes()


class ArchiveSource(Source):
    """Images in `folders` below the folder `base` ("" or ending in a slash) of a zip or tar."""

    def __init__(self, location: Path, archive: "_Archive", base: str, folders: list[str]) -> None:
        self._archive, self._base = archive, base
        stat = location.stat()
        inside = [name.removeprefix(base) for name in archive.names if name.startswith(base)]
        paths = [path for path in inside if path.split("/", 1)[0] in folders]
        super().__init__(location, base, folders, dict.fromkeys(paths, (stat.st_size, stat.st_mtime_ns)))

    def read(self, path: str) -> bytes:
        return self._archive.read(self._base + path)


class _Archive(NamedTuple):
    names: list[str]  # of the images
    read: Callable[[str], bytes]  # from any thread


def _open_zip(location: Path) -> _Archive:
    archive = zipfile.ZipFile(location)
    names = {posixpath.normpath(name): name for name in archive.namelist() if not name.endswith("/")}  # some begin with ./
    return _Archive(list(filter(is_image, names)), lambda name: archive.read(names[name]))


def _open_tar(location: Path) -> _Archive:
    with tarfile.open(location, "r:") as archive:
        members = {posixpath.normpath(member.name): member for member in archive}
    images = [name for name, member in members.items() if is_image(name) and not member.isdir()]
    files = {name: file for name in images if (file := _file_of(name, members)) is not None}
    places = {name: (file.offset_data, file.size) for name, file in files.items()}
    if missing := [name for name in images if name not in files]:
        log.warning("%s: %d links to images lead to no file in it, and are left out, %s for one", location, len(missing), missing[0])

    def read(name: str) -> bytes:
        offset, size = places[name]
        with open(location, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return _Archive(list(places), read)


def _file_of(name: str, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a member is, or that it is a link to (of files with several names a tar holds all but the first as links)."""
    seen = set()
    while (member := members.get(name)) is not None and name not in seen:
        if not (member.islnk() or member.issym()):
            return member if member.isfile() else None
        seen.add(name)
        name = posixpath.normpath(posixpath.join("" if member.islnk() else posixpath.dirname(name), member.linkname))
    return None


def find_source(root: Path, name: str, accept: Accept, belongs: Callable[[Source], bool] = lambda source: True) -> Source | None:
    """The first place in `root` where `accept` finds the data set.

    Looked at, in this order: `root` itself; its folders called like `name` (case, "-" and "_" aside); its archives (.zip, .tar) called
    so, or its only archive. In an archive one leading folder is skipped. With `name=""` an only folder is looked into as well.

    Args:
        belongs: whether the images found are the data set's; the search goes on where they are not.

    Raises:
        ValueError: if an archive cannot be read that was named, here or by the user.
    """
    for location in _candidates(root, name):
        try:
            source = _open_folder(location, accept) if location.is_dir() else _open_archive(location, accept)
        except ValueError as error:
            if name == "" or location == root or name in _plain(location.name):
                raise
            log.warning("%s", error)  # perhaps something else that lies beside the data set, half downloaded
            continue
        if source is not None and belongs(source):
            return source
    return None


def _candidates(root: Path, name: str) -> list[Path]:
    if not root.is_dir():
        return [root] if root.is_file() else []
    children = sorted(child for child in root.iterdir() if not _is_hidden(child.name))
    folders = [child for child in children if child.is_dir()]
    archives = [child for child in children if child.suffix.lower() in ARCHIVE_SUFFIXES and child.is_file()]

    def called(paths: list[Path]) -> list[Path]:
        return [path for path in paths if name and name in _plain(path.name)]

    only_folder = folders if name == "" and len(folders) == 1 else []
    only_archive = archives if len(archives) == 1 else []
    return [root, *(called(folders) or only_folder), *(called(archives) or only_archive)]


def _plain(file_name: str) -> str:
    return re.sub(r"[-_ ]", "", file_name.lower())


def _open_folder(location: Path, accept: Accept) -> Source | None:
    folders = accept({child.name for child in location.iterdir() if child.is_dir() and not _is_hidden(child.name)})
    return FolderSource(location, folders) if folders else None


def _open_archive(location: Path, accept: Accept) -> Source | None:
    try:
        archive = (_open_zip if location.suffix.lower() == ".zip" else _open_tar)(location)
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{location} is not a readable zip or uncompressed tar file ({error}); replace it, or set dataset.root to an unpacked folder"
        ) from error
    inside = [name.split("/") for name in archive.names]
    bases = {"": {parts[0] for parts in inside if len(parts) > 1}}
    for parts in inside:
        if len(parts) > 2:
            bases.setdefault(f"{parts[0]}/", set()).add(parts[1])
    for base, names in bases.items():
        if folders := accept(names):
            return ArchiveSource(location, archive, base, folders)
    return None


def _refuse(error: OSError) -> NoReturn:
    """A folder that cannot be listed is no empty one."""
    raise error


def _leads_back(folder: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    return os.path.islink(folder) and os.path.realpath(folder) in (os.path.realpath(parent) for parent in Path(folder).absolute().parents)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_image(path: str) -> bool:
    """Whether a path, relative to the folder that was given, names an image: by its suffix, and nothing hidden."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not any(map(_is_hidden, path.split("/")))


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
