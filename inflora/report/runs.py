"""Finding and reading run folders."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from inflora import config as configuration

# Runs that differ in nothing else are repetitions of one experiment. The hash of the tensors says what was in a backbone's checkpoint.
NOT_PART_OF_THE_EXPERIMENT = ("seed", "backbone.checkpoint", *sorted(configuration.RESULT_FREE))

# fmt: off
_REQUIRED = (  # names in summary.json
    "method", "dataset", "backbone", "backbone_tag", "seed", "num_tasks", "task_sizes", "class_order", "test_counts", "test_hash", "split",
    "weights_sha256", "transform", "normalize", "accuracy_curve", "last_accuracy", "last_accuracy_macro", "average_accuracy",
    "average_accuracy_macro", "forgetting", "forgetting_clamped", "forgetting_coda", "forgetting_libcontinual", "backward_transfer",
    "learning_accuracy", "task_aware_accuracy", "task_id_accuracy", "trainable_parameters", "stored_parameters", "peak_memory_bytes",
    "wall_seconds", "weights", "history",
)
_REQUIRED_OF_A_PART = ("num_tasks", "device", "git_commit", "git_dirty", "versions")  # of every part in its history
# fmt: on


@dataclass(frozen=True)
class Run:
    """One finished run folder.

    Attributes:
        path: the folder, as the user named it.
        summary: summary.json; accuracies in percent.
        settings: config.yaml, flat ("trainer.epochs": "5"), without the keys of `NOT_PART_OF_THE_EXPERIMENT`; and
            `planned_tasks`, on which some methods depend: several for a sequence that was continued.
        root: where its images were.
        accuracy: (T, T) percent, nan where not measured.
    """

    path: Path
    summary: dict[str, Any]
    settings: dict[str, str]
    root: str
    accuracy: NDArray[np.float64]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Code, versions and device of every part of the run, see `Records`."""
        return self.summary["history"]

    @property
    def stream(self) -> tuple[int, tuple[int, ...]]:
        """What two methods must share for their difference to be paired: seed and class order."""
        return self.summary["seed"], tuple(self.summary["class_order"])


def find_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read every finished run in or below the given folders.

    Returns:
        The runs in the order of their paths, and one sentence for each run folder that was left out.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if no finished run is found.
    """
    named = {path.resolve(): path for folder in folders for path in _run_folders(Path(folder))}  # once, however it is named
    paths = sorted(named.values())
    runs, left_out = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except ValueError as error:
            left_out.append(str(error))
    if not runs:
        looked_in = ", ".join(map(str, folders))
        why = " ".join(left_out) or "There is no folder with a config.yaml."
        raise ValueError(f"no finished run in {looked_in}: give the folders of finished runs, or one above them. {why}")
    return runs, left_out


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        ValueError: if the run is unfinished, or a file of it cannot be read.
    """
    if not (path / "summary.json").exists():
        raise ValueError(f"{path} is unfinished (no summary.json): left out.")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        config = configuration.read(path)
        accuracy = pd.read_csv(path / "accuracy_matrix.csv").to_numpy(dtype=np.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}): left out.") from error
    missing = [name for name in _REQUIRED if name not in summary]
    missing += [name for name in _REQUIRED_OF_A_PART if any(name not in part for part in summary.get("history", []))]
    if config is None:
        raise ValueError(f"{path} has no config.yaml: left out.")
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)} in its summary.json: left out.")
    if accuracy.shape != (summary["num_tasks"],) * 2:
        shape = " x ".join(map(str, accuracy.shape))
        raise ValueError(f"{path} has {summary['num_tasks']} tasks but an accuracy_matrix.csv of {shape}: left out.")
    settings = _settings(config)
    planned = dict.fromkeys(part["num_tasks"] for part in summary["history"])
    settings["planned_tasks"] = ", ".join(map(str, planned))
    return Run(path, summary, settings, config["dataset"].get("root", ""), accuracy)


def _run_folders(folder: Path) -> list[Path]:
    """Run folders in or below `folder`: those with a config.yaml. Hidden folders (.hydra has one too) are skipped."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give run folders, or folders that hold them.")
    found = []
    for parent, children, files in os.walk(folder):
        if "config.yaml" in files:
            found.append(Path(parent))
            children.clear()
        children[:] = [child for child in children if not child.startswith(".")]
    return found


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """Dotted keys and printable values, without those of `NOT_PART_OF_THE_EXPERIMENT`."""
    return {key: _printed(value) for key, value in configuration.leaves(config, NOT_PART_OF_THE_EXPERIMENT).items()}


def _printed(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # 1.0 is the same setting as 1
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)
