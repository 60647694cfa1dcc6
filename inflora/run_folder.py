"""A run's folder: whether the run in it is the one asked for, whether it is finished, whether it may go on, and with what it began."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from inflora import config as configuration
from inflora.backbone import Backbone
from inflora.checkpoint import CheckpointError, CheckpointFolder, write_atomically
from inflora.data.tasks import TaskSequence
from inflora.method import Method
from inflora.results import read_summary

LENGTH = {"dataset.num_tasks", "dataset.task_sizes", "dataset.class_order"}
"""Keys that may differ if the tasks of the old run are the first of the new one."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the run folder, made if missing, for this process. The lock is the system's: it goes when the process dies, however it dies.

    Raises:
        CheckpointError: if another process holds it, or it cannot be written.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"another process is at work in {folder}; wait until it ends, or choose another output_dir") from None
    except OSError as error:
        raise CheckpointError(f"output_dir={folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def look_up(folder: Path, plain: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The summary and the configuration of the folder's run if that is this one and finished. Touches nothing.

    Raises:
        ValueError: if the folder holds another run.
    """
    old = configuration.read(folder)
    if old is None:
        return None
    if plain["resume"] == "never":
        raise ValueError(f"output_dir={folder} holds a run already and resume=never; choose another output_dir")
    different = config_differences(old, plain, configuration.RESULT_FREE)
    hard = [key for key in different if key not in LENGTH]
    if hard:
        values = ", ".join(f"{key} ({_value(old, key)} there, {_value(plain, key)} here)" for key in hard)
        raise ValueError(f"output_dir={folder} holds a run of another configuration, which differs in {values}; choose another output_dir")
    found = None if different else read_summary(folder)
    return None if found is None else (found, old)


def _value(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name, "nothing") if isinstance(value, dict) else "nothing"
    return value


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: set[str]) -> list[str]:
    """The dotted keys, sorted, whose values differ between two nested configurations.

    Args:
        old: one configuration.
        new: the other.
        ignore: dotted keys that may differ; a key stands for everything below it too.
    """
    before, after = configuration.leaves(old, ignore), configuration.leaves(new, ignore)
    return sorted(key for key in before.keys() | after.keys() if key not in before or key not in after or before[key] != after[key])


def check_begun(folder: Path, sequence: TaskSequence, backbone: Backbone | None = None) -> None:
    """The tasks that the folder's run has begun with must be the first ones of this run, with the same images, and its weights the same.

    Args:
        backbone: None: weights are not compared.

    Raises:
        ValueError: if they are not.
    """
    old = last_run_event(folder)
    if old is None:
        return
    if backbone is not None and old["weights"]["source"] != "random" and old["weights"]["sha256"] != backbone.weights["sha256"]:
        raise ValueError(
            f"output_dir={folder} holds a run that began with other weights of {backbone.tag}, whose file has changed since; "
            "choose another output_dir"
        )
    new = [task.class_names for task in sequence.tasks]
    if new[: len(old["tasks"])] != old["tasks"]:
        raise ValueError(
            f"output_dir={folder} holds a run over other tasks: dataset.num_tasks, dataset.task_sizes, dataset.class_order and the "
            "classes in dataset.root must give the same tasks, or the same and then more; choose another output_dir"
        )
    if sequence.image_hashes[: len(old["tasks"])] != old["image_hashes"]:
        raise ValueError(
            f"output_dir={folder} holds a run on other images: those of the tasks it has begun with must stay the same training and test "
            "images in dataset.root; choose another output_dir"
        )
    if sequence.stream == "joint" and new != old["tasks"]:
        raise ValueError(
            f"output_dir={folder} holds a run that learned all its classes at once, so it cannot go on with more; choose another output_dir"
        )


def write_configuration(folder: Path, plain: dict[str, Any], hydra_files: dict[str, str]) -> None:
    """Make the folder that of a run which is not finished: its configuration, and in `.hydra/` the files of these names and contents."""
    for file in ("summary.json", "report/report.html"):  # of a shorter sequence, which is now continued
        (folder / file).unlink(missing_ok=True)
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, text in hydra_files.items():
        (folder / ".hydra" / name).write_text(text, encoding="utf-8")
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def finished_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary of the finished run in a folder, and its resolved configuration, to rebuild its model from its last checkpoint.

    That holds all weights: the configuration asks for no pretrained ones, which may no longer be where they were.

    Raises:
        ValueError: if there is none, or one of the two is damaged.
    """
    found, plain = read_summary(folder), configuration.read(folder)
    if plain is None:
        raise ValueError(f"{folder} holds no finished run (no config.yaml); give the folder of one run")
    if found is None:
        raise ValueError(f"{folder} holds no finished run (no summary.json); give its command again, with output_dir={folder}")
    return found, {**plain, "backbone": {**plain["backbone"], "pretrained": False, "checkpoint": None}}


def load_trained(method: Method, folder: Path) -> None:
    """Bring a method to where the finished run in a folder ended.

    Raises:
        ValueError: if the folder's last checkpoint is missing or damaged.
    """
    state = CheckpointFolder(folder / "checkpoints").latest()
    if state is None:
        raise ValueError(f"{folder} has no checkpoint left")
    num_stages = 1 if method.stream == "joint" else state["records"]["matrices"].shape[1]
    if "epoch" in state["position"] or state["position"]["stage"] < num_stages:  # an older one, before the end of the last task
        raise ValueError(f"the last checkpoint of {folder} is damaged; restore it from a copy, or train again in another folder")
    method.load_state_dict(state["method"])


def last_run_event(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder last announced: its `tasks`, lists of class names, among it; None where none has begun.

    Raises:
        ValueError: if one has, but what it announced is lost.
    """
    file = folder / "metrics.jsonl"
    events = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave half a line; resuming cuts it off
            events.append(json.loads(line))
    found = next((event for event in reversed(events) if event["event"] == "run"), None)
    if found is None and not CheckpointFolder(folder / "checkpoints").is_empty:
        raise ValueError(f"{file} no longer says what its run began with; restore it from a copy, or choose another output_dir")
    return found
