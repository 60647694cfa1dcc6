"""Test a finished run again, without training: `python -m inflora.evaluate RUN_DIR`.

Loads the last checkpoint and the run's own configuration, tests on every task, prints the accuracies beside the recorded ones, and exits
with 1 if they differ. Nothing in the run folder is changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from inflora import config as configuration
from inflora.device import has_device, is_cpu
from inflora.run import USER_ERRORS, build, load_images, make_fabric, sound_kernels
from inflora.run_folder import finished_run, last_run_event, load_trained
from inflora.terminal import tolerate_any_encoding
from inflora.trackers import read_matrix
from inflora.trainer import evaluate

TOLERANCE = {"32": 0.0005, "bf16": 0.005, "16": 0.005}
"""By `trainer.precision`, the largest difference in a task's accuracy, as a fraction, that another device or batch size explains: near-ties
in the scores. One image of a task is always allowed."""


@sound_kernels()
def evaluate_run(folder: Path, changes: dict[str, Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Test the final model of a finished run.

    Args:
        folder: the run folder.
        changes: other values for keys of the groups `dataset` and `trainer` that change no result, by dotted name: `dataset.root`, ...

    Returns:
        (T,) accuracy on each task over all classes as tested now, and as recorded; fractions.

    Raises:
        ValueError: if the folder holds no finished run, or the images are of other classes than the run's.
    """
    _, plain = finished_run(folder)
    for key, value in (changes or {}).items():
        group, _, name = key.partition(".")
        plain[group][name] = value
    configuration.check(OmegaConf.create(plain))
    device = plain["trainer"]["device"]
    if not has_device(device) and "trainer.device" not in (changes or {}):
        raise ValueError(f"{folder} was trained with trainer.device={device}, which this machine does not have; add --device cpu")
    plain["trainer"]["num_devices"] = 1
    if plain["trainer"]["precision"] == "16" and is_cpu(plain["trainer"]["device"]):
        plain["trainer"]["precision"] = "32"  # what a CPU has
    fabric = make_fabric(plain["trainer"])
    fabric.launch()
    trained = last_run_event(folder)
    splits = load_images(plain["dataset"])
    if trained is not None and sorted(splits.class_names) != sorted(name for task in trained["tasks"] for name in task):
        raise ValueError(f"dataset.root={plain['dataset']['root']} has other classes than {folder} was trained on; test on the same ones")
    parts = build(fabric, plain, splits)
    load_trained(parts.method, folder)
    last = parts.sequence[len(parts.sequence) - 1]
    rates = evaluate(parts.method, parts.sequence.seen(last), parts.sequence.class_to_task, fabric)
    return rates[0], read_matrix(folder / "accuracy_matrix.csv")[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m inflora.evaluate", description="Test a finished run again, without training.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--root", help="where the images are now, if not where they were (dataset.root)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], help="other than the run's (trainer.device)")
    parser.add_argument("--batch-size", type=int, help="other than the run's (trainer.eval_batch_size)")
    given = parser.parse_args(arguments)
    tolerate_any_encoding()
    keys = {"dataset.root": given.root, "trainer.device": given.device, "trainer.eval_batch_size": given.batch_size}
    try:
        now, recorded = evaluate_run(given.run, {key: value for key, value in keys.items() if value is not None})
    except USER_ERRORS as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    table = Table("task", "now", "recorded")
    for task, (a, b) in enumerate(zip(now, recorded, strict=True)):
        table.add_row(str(task), f"{100 * a:.2f}", f"{100 * b:.2f}")
    Console().print(table)
    found, plain = finished_run(given.run)
    allowed = np.maximum(TOLERANCE[plain["trainer"]["precision"]], 1.5 / np.array(found["test_counts"]))
    agree = bool((np.abs(now - recorded) <= allowed).all())
    print("Same as recorded." if agree else "Not the same as recorded: other images, weights, packages or another precision than then.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
