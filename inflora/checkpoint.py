"""Checkpoints that survive a kill at any instant, and what else makes files safe: written in one go, and hashed.

A checkpoint is a pair in one folder, written one after the other and each of them atomically:

    000012-task2.safetensors     the tensors; the nest they came from (dicts, lists, numbers ...) is JSON in the file's metadata
    000012-task2.json            the sha256 of the file above: the checkpoint exists from the moment this record does

Nothing is pickled, so loading a checkpoint never executes code. `base.safetensors` holds the tensors a run starts from; the checkpoints
of the run leave out every tensor that is still bit for bit the base's, which for most methods is nearly the whole backbone. One inside a
task leaves out those of the last task's end, too: what that task has merged into the weights, say.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inflora.seeding import scrambled

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint, or another file of a run, cannot be written or read. The message is one sentence for the user."""


class WriteError(CheckpointError):
    """One that cannot be written: the run can go on from what is saved when the user has put that right."""


# ---- atomic files, hashes ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path`: a reader sees the old file or the new one, never half.

    Raises:
        WriteError: if the file cannot be written (a full disk, say); `path` is then what it was before.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with contextlib.suppress(PermissionError):  # of disks that know no such thing
            temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes private files; here whoever sees the folder may read
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: Exception) -> WriteError:
    """The sentence for a file that cannot be written. safetensors reports the system's reason at the end of its own message."""
    reason = error.strerror if isinstance(error, OSError) else str(error).rsplit(": ", 1)[-1]
    return WriteError(f"cannot write {path}: {reason}; everything saved before is intact")


def _fsync(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows cannot open a folder; it has no need to
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- one checkpoint ----------------------------------------------------------------------------------------------------------------


def save(path: Path, state: Any, *, bases: Sequence[Path] = (), marks: "Marks | None" = None, **notes: str | bool) -> None:
    """Write `state` to `path` (.safetensors) and its record to the .json beside it.

    Args:
        path: where; the folder exists.
        state: any nest of dict (keys: str or int), list, tuple, Tensor, int, float, bool, str and None. Tensors come back on the CPU with
            the same type, shape and bits; two that share memory come back as two.
        bases: earlier checkpoints in the same folder; tensors equal to one of the same name that is stored there are not stored again.
        marks: what earlier calls with these bases have left here, and this one leaves: see `_keys_equal_in`.
        notes: written in the record, for people and for `CheckpointFolder`.

    Raises:
        WriteError: if it cannot be written; an earlier checkpoint of another name is untouched.
        TypeError: if `state` holds anything else.
    """
    structure, tensors = _flatten(state)
    marks = {} if marks is None else marks
    now = _marks_of(tensors)
    elsewhere = []
    for base in bases:
        keys = _keys_equal_in(base, tensors, now, marks.setdefault(base.name, {}))
        elsewhere.append({"name": base.name, "sha256": _recorded_sha256(base), "keys": keys})
        tensors = {key: tensor for key, tensor in tensors.items() if key not in keys}
    marks[path.name] = {key: now[key] for key in tensors if key in now}
    stored = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"structure": json.dumps(structure, allow_nan=False), "bases": json.dumps(elsewhere)}
    write_atomically(path, lambda temporary: save_file(_separate(stored), temporary, metadata=metadata))
    text = json.dumps(notes | {"sha256": sha256_file(path)}, indent=2) + "\n"
    write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(text))


def load(path: Path) -> Any:
    """Read what `save` wrote, after checking the hashes of the file and of its bases.

    Raises:
        CheckpointError: if the file or one of its bases is missing or damaged.
    """
    _verify(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = _read(file, file.keys())
    for base in json.loads(metadata["bases"]):
        base_path = path.with_name(base["name"])
        if _verify(base_path) != base["sha256"]:
            raise CheckpointError(f"{base_path} is not the file that {path} was saved against")
        with safe_open(base_path, "pt") as file:
            tensors |= _read(file, base["keys"])
    return _decode(json.loads(metadata["structure"]), tensors)


def _read(file: safe_open, keys: Iterable[str]) -> dict[str, Tensor]:
    return {key: file.get_tensor(key).clone() for key in keys}  # cloned: the originals are windows on a file that will be removed


def _record(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}  # missing or damaged: no hash to trust, no boundary


def _recorded_sha256(path: Path) -> str:
    sha256 = _record(path).get("sha256")
    if not isinstance(sha256, str):
        raise CheckpointError(f"{path.with_suffix('.json')} is missing or damaged")
    return sha256


def _verify(path: Path) -> str:
    """The sha256 of the file, which is also the one in its record."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    sha256 = sha256_file(path)
    if sha256 != _recorded_sha256(path):
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {path.with_suffix('.json').name}")
    return sha256


def _flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The nest as JSON values, with {"tensor": key} where a tensor was, and the tensors by key ("method/backbone.norm.weight")."""
    tensors: dict[str, Tensor] = {}
    return _encode(state, "", tensors), tensors


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # The keys 1 and "1" of one dict would give one name; safetensors keeps "__metadata__" for itself.
        while key in tensors or key == "__metadata__":
            key += "'"
        tensors[key] = value.detach()
        return {"tensor": key}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}  # strict JSON has no NaN
    prefix = f"{key}/" if key else ""
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{prefix}{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(name, str | int) for name in value):
        return {"dict": [[name, _encode(item, f"{prefix}{name}", tensors)] for name, item in value.items()]}
    raise TypeError(
        f"state entry {key!r} is a {type(value).__name__}; a checkpoint holds dicts with str or int keys, lists, tuples, tensors, "
        "numbers, strings and None: convert it"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {name: _decode(item, tensors) for name, item in content}


Mark = tuple[torch.dtype, torch.Size, int]
"""What tells two tensors apart without having both: type, shape and a hash of the bits, the same for different ones once in 2**64."""

Marks = dict[str, dict[str, Mark]]
"""File name -> key -> mark of a tensor that is stored there."""


def _keys_equal_in(base: Path, tensors: dict[str, Tensor], now: dict[str, Mark], marks: dict[str, Mark]) -> list[str]:
    """The keys of the tensors that are stored in the base, bit for bit.

    To compare a tensor on a device, it has to come to the host: hundreds of megabytes for a backbone that hardly ever changes. So what is
    stored leaves its mark, to compare with next time.

    Args:
        now: of the tensors that are on a device.
        marks: of those in the base, as far as they are known; more are when this returns.
    """
    equal = []
    try:
        with safe_open(base, "pt") as file:  # memory-mapped: one tensor at a time
            for key in tensors.keys() & set(file.keys()):
                if key in now and key in marks:
                    is_same = now[key] == marks[key]
                else:
                    known = file.get_tensor(key)
                    is_same = _is_same(tensors[key].cpu(), known)
                    if key in now:
                        marks[key] = now[key] if is_same else _mark(known, int(_bit_sum(known)))
                equal += [key] if is_same else []
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{base} is missing or damaged") from error
    return sorted(equal)


def _marks_of(tensors: dict[str, Tensor]) -> dict[str, Mark]:
    """Those of the tensors that are on a device, which is waited for once."""
    there = {key: tensor for key, tensor in tensors.items() if tensor.device.type != "cpu"}
    sums = torch.stack([_bit_sum(tensor) for tensor in there.values()]).tolist() if there else []
    return {key: _mark(tensor, bit_sum) for (key, tensor), bit_sum in zip(there.items(), sums, strict=True)}


def _mark(tensor: Tensor, bit_sum: int) -> Mark:
    return tensor.dtype, tensor.shape, bit_sum


_SCRAMBLED_AT_ONCE = 2**22  # words; each takes some forty bytes on the way


def _bit_sum(tensor: Tensor) -> Tensor:
    """A hash of the bits, an int64 scalar on the tensor's device: another one for sure where one element differs."""
    parts = _integers(tensor).split(_SCRAMBLED_AT_ONCE)
    return torch.stack([scrambled(part.long(), at * _SCRAMBLED_AT_ONCE).sum() for at, part in enumerate(parts)]).sum()


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_integers(a), _integers(b))


def _integers(tensor: Tensor) -> Tensor:
    """(n,) integers with the bits of the elements. Comparing them tells 0.0 from -0.0 and calls a NaN equal to itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes would do for all, at a quarter of the speed
    return tensor.contiguous().view(-1).view(kinds.get(tensor.element_size(), torch.int64))


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, no two in one piece of memory: safetensors refuses those."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


# ---- the checkpoints of a run ------------------------------------------------------------------------------------------------------


class CheckpointFolder:
    """The checkpoints of one run: numbered, the newest few kept.

    Only `save` and `save_base` change the folder, so anybody may read it while the run goes on.

    Args:
        path: the folder; made when something is saved.
        keep: how many of the newest checkpoints stay. Of those saved with `boundary=True`, the one that each follows stays too.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = keep
        self.base = self.path / "base.safetensors"
        self._damaged: set[Path] = set()  # found by `latest`: they must not count among the kept
        self._marks: Marks = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was saved but the base."""
        return not self._paths()

    def save_base(self, state: Any) -> None:
        """Store once, before the first checkpoint, what later ones need not repeat: e.g. `{"method": method.state_dict()}`.

        Raises:
            CheckpointError: if it cannot be written.
        """
        assert self.is_empty, "the base of existing checkpoints must not change"
        self.path.mkdir(parents=True, exist_ok=True)
        self.base.with_suffix(".json").unlink(missing_ok=True)  # a kill in between must not leave an old record beside a new file
        save(self.base, state, marks=self._marks)

    def save(self, state: Any, tag: str, *, boundary: bool = False) -> None:
        """Write the next checkpoint, then remove those no longer kept, and what a killed process left.

        Args:
            state: see `save`.
            tag: letters, digits, `_` and `-`; becomes part of the name.
            boundary: whether a task has just ended.

        Raises:
            CheckpointError: if it cannot be written; the earlier ones stay, and nothing of this one does.
        """
        assert re.fullmatch(r"[\w-]+", tag), f"unsuitable as part of a file name: {tag!r}"
        self.path.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name.split("-")[0]) for path in self._paths()), default=0)
        bases = [self.base] if self.base.with_suffix(".json").exists() else []
        if not boundary:  # these stand by themselves: the next one need not keep this one
            bases += _boundaries(self._sound())[-1:]
        try:
            save(self.path / f"{number:06d}-{tag}.safetensors", state, bases=bases, marks=self._marks, tag=tag, boundary=boundary)
        finally:
            self._prune()

    def latest(self) -> Any | None:
        """The newest state that can be read, or None if none was saved. Each newer one that cannot is named in a warning.

        Raises:
            CheckpointError: if there are checkpoints but none can be read.
        """
        return self._first_readable(self._paths())

    def latest_boundary(self) -> Any | None:
        """Like `latest`, among those saved with `boundary=True`."""
        return self._first_readable(_boundaries(self._paths()))

    def _paths(self) -> list[Path]:
        """The tensor files of the checkpoints (those with a record), oldest first."""
        return sorted(path.with_suffix(".safetensors") for path in self.path.glob("[0-9]*-*.json"))

    def _sound(self) -> list[Path]:
        """Those not found damaged."""
        return [path for path in self._paths() if path not in self._damaged]

    def _first_readable(self, paths: list[Path]) -> Any | None:
        error = None
        for path in reversed(paths):
            try:
                return load(path)
            except CheckpointError as reason:
                error = reason
                self._damaged.add(path)
                logger.warning("checkpoint %s cannot be used: %s", path.name, reason)
        if error is not None:
            raise CheckpointError(
                f"no checkpoint in {self.path} can be read ({error}); restore the folder from a copy, or remove it to start this run again"
            ) from error
        return None

    def _prune(self) -> None:
        paths = self._sound()
        kept, boundaries = paths[-self.keep :], _boundaries(paths)
        followed = [max((boundary for boundary in boundaries if boundary <= path), default=path) for path in kept]
        names = {path.with_suffix(suffix).name for path in kept + followed for suffix in (".json", ".safetensors")}
        files = [file for pattern in ("[0-9]*-*.json", "[0-9]*-*.safetensors", "*.tmp", ".tmp*") for file in self.path.glob(pattern)]
        for file in files:  # records first: without one, what is left of a checkpoint is no checkpoint. safetensors writes .tmp*
            if file.name not in names:
                file.unlink(missing_ok=True)
        self._marks = {name: marks for name, marks in self._marks.items() if name in names or name == self.base.name}


def _boundaries(paths: list[Path]) -> list[Path]:
    return [path for path in paths if _record(path).get("boundary") is True]
