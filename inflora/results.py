"""What a run records: the accuracy matrices, the timings, and `summary.json`."""

import contextlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inflora import __version__
from inflora.backbone import Backbone
from inflora.data.tasks import TaskSequence
from inflora.method import Method
from inflora.metrics import summarize

WALL_PARTS = ("subspace", "train", "evaluate")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "lightning-fabric", "hydra-core", "safetensors", "scikit-learn", "pillow")


class Records:
    """The numbers a run collects, task after task.

    Attributes:
        matrices: (3, T, T), in [0, 1], nan where nothing was measured: class-incremental accuracy, accuracy when the task is given, share
            of images assigned to the right task; row i after training task i, column j for the test images of task j.
        trainable_parameters: numbers trained in each stage.
        wall_seconds: time spent per part, summed over resumed parts of the run.
        history: the planned number of tasks, the device, the code and the package versions of each part of the run; equal parts in a row
            are one.

    Args:
        num_tasks: tasks of the sequence.
        device: whose memory is watched.
    """

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.device = device
        self._peak_before = 0
        self.history = [{"num_tasks": num_tasks, "device": device_name(device), **git_revision(), "versions": package_versions()}]
        self.matrices = np.full((3, num_tasks, num_tasks), np.nan)
        self.trainable_parameters: list[int] = []
        self.wall_seconds: dict[str, float] = dict.fromkeys(WALL_PARTS, 0.0)
        self._clocks: dict[str, float] = {}
        self._total_before, self._began = 0.0, time.monotonic()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the time inside as this part's."""
        self._clocks[part] = time.monotonic()
        try:
            yield
        finally:
            self.wall_seconds[part] += time.monotonic() - self._clocks.pop(part)

    def _parts(self) -> dict[str, float]:
        """`wall_seconds` up to now, with the clocks that are running: a checkpoint is written while they do."""
        now = time.monotonic()
        return {part: seconds + (now - self._clocks.get(part, now)) for part, seconds in self.wall_seconds.items()}

    @property
    def total_seconds(self) -> float:
        return self._total_before + time.monotonic() - self._began

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any part of the run has held."""
        return max(self._peak_before, peak_memory_bytes(self.device))

    def add(self, row: int, rates: np.ndarray) -> None:
        """The test results after training task `row`: (3, number of tasks), nan for tasks not tested."""
        self.matrices[:, row, : row + 1] = rates[:, : row + 1]

    def latest(self, test_counts: Sequence[int]) -> dict[str, Any]:
        """The newest row: accuracies over all seen classes, and the accuracy on each task, in percent."""
        row = int(np.flatnonzero(~np.isnan(self.matrices[0]).all(axis=1))[-1])
        weights = np.asarray(test_counts[: row + 1]) / sum(test_counts[: row + 1])
        means = 100 * self.matrices[:, row, : row + 1] @ weights
        names = ("accuracy", "task_aware_accuracy", "task_id_accuracy")
        return {**dict(zip(names, means.tolist(), strict=True)), "accuracy_per_task": (100 * self.matrices[0, row, : row + 1]).tolist()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "matrices": torch.from_numpy(self.matrices.copy()),
            "trainable_parameters": list(self.trainable_parameters),
            "wall_seconds": self._parts(),
            "total_seconds": self.total_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved records; the saved run may have had fewer tasks."""
        saved = state["matrices"].numpy()
        self.matrices[:, : saved.shape[1], : saved.shape[2]] = saved
        self.trainable_parameters = list(state["trainable_parameters"])
        self.wall_seconds = dict(state["wall_seconds"])
        self._total_before, self._began = state["total_seconds"], time.monotonic()
        self._peak_before = state["peak_memory_bytes"]
        before = state["history"]
        self.history = before + self.history if before[-1:] != self.history else before

    def timings(self) -> dict[str, float]:
        """`wall_seconds` as written: the parts, everything else, and the total."""
        parts, total = self._parts(), self.total_seconds
        return {**parts, "other": max(0.0, total - sum(parts.values())), "total": total}


def summary(
    config: dict[str, Any], choices: dict[str, str], backbone: Backbone, sequence: TaskSequence, method: Method, records: Records
) -> dict[str, Any]:
    """The content of `summary.json`, percent where it is an accuracy."""
    return {
        **choices,
        "backbone_tag": backbone.tag,
        "seed": config["seed"],
        "num_tasks": sequence.num_tasks,
        "task_sizes": list(sequence.task_sizes),
        "class_order": list(sequence.class_order),
        **summarize(records.matrices[0], records.matrices[1], records.matrices[2], sequence.test_counts),
        "trainable_parameters": max(records.trainable_parameters, default=0),
        "trainable_parameters_per_task": records.trainable_parameters,
        "stored_parameters": stored_parameters(method),
        "total_parameters": sum(parameter.numel() for parameter in method.parameters()),
        "wall_seconds": records.timings(),
        "peak_memory_bytes": records.peak_memory_bytes,
        "test_counts": list(sequence.test_counts),
        "test_hash": sequence.test_hash,
        "train_hash": sequence.train_hash,
        "split": sequence.split_id,
        "transform": config["dataset"]["transform"],
        "normalize": config["dataset"]["normalize"],
        "weights": backbone.weights,
        "weights_sha256": backbone.weights["sha256"] or backbone.weights["tensors_sha256"],
        **records.history[-1],
        "history": records.history,
    }


def stored_parameters(method: Method) -> int:
    """Numbers a method keeps between tasks besides the pretrained backbone: heads, branches, memories, statistics."""
    return count_numbers(method.state_dict()) - method.num_pretrained


def count_numbers(state: Any) -> int:
    """Numbers in all tensors of a nest of dicts and lists."""
    if isinstance(state, Tensor):
        return state.numel()
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(count_numbers(value) for value in inner)


def reset_peak_memory(device: torch.device) -> None:
    """Count `peak_memory_bytes` from now on. Where a system cannot (macOS), what earlier runs of the process needed counts too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the device if that is a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # on Windows: not known
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count kilobytes


def device_name(device: torch.device) -> str:
    """What a run ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


def package_versions() -> dict[str, str]:
    return {"inflora": __version__, "python": platform.python_version(), **dict(_installed())}


def _installed() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def git_revision() -> dict[str, Any]:
    """Commit of the clone this code runs from, and whether its code has changed since; null for an installed package."""
    root, code = Path(__file__).parent.parent, ["inflora", "conf", "train.py"]  # what else lies in the clone changes no result
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "--", *code], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": bool(changes.strip())}


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    file = folder / "summary.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the same command writes it again") from error
