"""Compose configurations, run toys, compare run folders."""

import copy
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import toy  # noqa: F401  timm knows vit_toy from here on
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from inflora import checkpoint, config, plugins
from inflora.run import run
from inflora.trackers import read_matrix

config.register()
plugins.register()

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))

TOY = [
    "dataset._target_=toy.tiny",
    "dataset.root=unused",
    "dataset.num_tasks=3",
    "dataset.transform=shift_flip",
    "backbone.name=vit_toy.test",
    "backbone.pretrained=false",
    "~recipe",
    "~inputs",
    "~tuning",
    "optimizer.lr=5e-3",
    "trainer.epochs=2",
    "trainer.batch_size=8",
    "trainer.device=cpu",
    "trainer.progress=false",
]
"""Overrides that make any run a toy: 3 tasks of 2 classes, 2 epochs of 2 steps each."""


TINY_VIT = ["backbone.name=test_vit.r160_in1k", "backbone.pretrained=false", "dataset.image_size=32"]
"""timm's own smallest vision transformer, for processes that do not import toy.py before the backbone is built."""


def compose_config(*overrides: str) -> DictConfig:
    """A configuration as the command line composes it."""
    return copy.deepcopy(_compose(overrides))


@functools.cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(plugins.own_conf()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


SMALL = {"rank": 2, "num_projections": 20, "freeze_epochs": 1}
"""Settings of methods, where they have them, that suit a toy."""


def toy_arguments(method: str) -> list[str]:
    """`TOY` for a method."""
    settings = compose_config(f"method={method}").method
    return [f"method={method}", *TOY, *(f"method.{key}={value}" for key, value in SMALL.items() if key in settings)]


def toy_config(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a toy run in `folder`."""
    method = next((text.removeprefix("method=") for text in overrides if text.startswith("method=")), "inflora")
    others = [text for text in overrides if text != f"method={method}"]
    cfg = compose_config(*toy_arguments(method), "output_dir=later", *others)
    cfg.output_dir = str(folder)  # not composed with it: composing takes as long as the run, and is done once per set of overrides
    return cfg


def run_toy(folder: Path, *overrides: str) -> dict[str, Any]:
    """Do, continue or look up a toy run; returns its summary."""
    return run(toy_config(folder, *overrides))


def read_events(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, all or of one kind, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    return [one for one in events if event in (None, one["event"])]


VARYING = {"time", "wall_seconds", "images_per_second", "peak_memory_bytes", "git_commit", "git_dirty", "history"}
"""What may differ between two runs of one configuration (somebody may be working in the clone)."""


def results(folder: Path) -> dict[str, Any]:
    """Everything a finished run found out, without clocks, memory and the state of the clone: equal for equal runs."""

    def timeless(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in VARYING}

    last = checkpoint.CheckpointFolder(folder / "checkpoints").latest()
    assert last is not None
    return {
        "matrices": [(folder / name).read_bytes() for name in ("accuracy_matrix.csv", "task_aware_matrix.csv")],
        "summary": timeless(json.loads((folder / "summary.json").read_text())),
        "events": [timeless(event) for event in read_events(folder)],
        "weights": fingerprint(last["method"]),
    }


def fingerprint(state: Any) -> str:
    """The sha256, in hexadecimal, of a nest as `checkpoint.save` takes it: equal when names, types, shapes and every bit are equal."""
    structure, tensors = checkpoint._flatten(state)
    digest = hashlib.sha256(json.dumps(structure).encode())
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(checkpoint._integers(tensor.cpu()).numpy().data)
    return digest.hexdigest()


CHAOTIC = {"lwf": 1e-2}
"""Toys in which steps of Adam make much of a small gradient's last bits: how far, relatively, a loss may be off."""


def assert_trained_alike(here: Path, there: Path, method: str) -> None:
    """Runs of one method on two devices: losses to 1e-3, and every accuracy to one of a task's eight images."""
    of_epochs = [[event["loss"] for event in read_events(folder, "epoch")] for folder in (here, there)]
    np.testing.assert_allclose(of_epochs[1], of_epochs[0], rtol=CHAOTIC.get(method, 1e-3))
    matrices = [read_matrix(folder / "accuracy_matrix.csv") for folder in (here, there)]
    assert np.nanmax(abs(matrices[0] - matrices[1])) <= 100 / 8


def num_rows(folder: Path) -> int:
    """How many tasks the accuracy matrix in a run folder has results for."""
    return int((~np.isnan(read_matrix(folder / "accuracy_matrix.csv")).all(axis=1)).sum())


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Relative path -> (time of change, content) of every file and folder below `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def train_py(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python train.py` in a process of its own, with the toy world importable."""
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, env=environment, **{"timeout": 600, **options}
    )


@dataclass(frozen=True)
class Said:
    """What a command line left with, and what it said."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]
