"""Every method through the command line, on toys: what a run promises holds for each yaml in conf/method. All of it is slow."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import METHODS, TINY_VIT, Cli, compose_config, num_rows, read_events, results, toy_arguments, train_py

from inflora.checkpoint import CheckpointFolder
from inflora.trackers import read_matrix
from inflora.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # minutes on a busy machine
    pytest.mark.usefixtures("no_report"),
]

here = pytest.mark.parametrize("cli", ["here"], indirect=True)  # command lines in this process; the sweep below starts one of its own
every_method = pytest.mark.parametrize("method", METHODS)

MATRICES = ("accuracy_matrix.csv", "task_aware_matrix.csv")


def finish(cli: Cli, folder: Path, *arguments: str) -> dict[str, Any]:
    """Do or continue a run; returns its summary."""
    said = cli(*arguments, f"output_dir={folder}")
    assert said.code == 0, said.err
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = CheckpointFolder(folder / "checkpoints").latest()
    assert last is not None
    return last["method"]["tensors"]


def assert_close(folder: Path, other: Path, *, same_answers: bool = True) -> None:
    """Weights within 1e-4 in norm, where they have one, and every test image answered the same way."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name].double()
        assert (value.double() - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-3), name
    for name in MATRICES if same_answers else ():
        assert (folder / name).read_bytes() == (other / name).read_bytes()


# ---- stopping and going on ---------------------------------------------------------------------------------------------------------


def stop_in(patch: pytest.MonkeyPatch, name: str, where: Callable[..., bool]) -> None:
    """SIGTERM in the calls of a method of `Trainer` of which `where` says so; the run stops at the next safe point."""
    original = getattr(Trainer, name)

    def stopping(self: Trainer, *arguments: Any) -> Any:
        if where(*arguments):
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    patch.setattr(Trainer, name, stopping)


def in_epoch(task: int, epoch: int) -> Callable[..., bool]:
    """For `Trainer._step`."""
    return lambda method, *others: (method.task.index, others[-1].epoch) == (task, epoch)


@here
@every_method
def test_stopped_inside_epochs_and_between_tasks_a_run_ends_with_the_same_bits(method, cli, tmp_path):
    """Of uneven tasks: 3, 1 and 2 steps an epoch."""
    arguments = [*toy_arguments(method), "dataset.task_sizes=[3,1,2]"]
    finish(cli, tmp_path / "whole", *arguments)
    epochs = [(event["task"], event["epoch"]) for event in read_events(tmp_path / "whole", "epoch")]
    stops: list[tuple[str, Callable[..., bool]]] = [("_step", in_epoch(*place)) for place in ((0, 1), (2, 0)) if place in epochs]
    stops.insert(min(1, len(stops)), ("_test", lambda method, sequence, task: task.index == 0))
    for name, where in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, name, where)
            said = cli(*arguments, f"output_dir={tmp_path / 'stopped'}")
            assert said.code == 130, f"{name}: {said.err}"
    finish(cli, tmp_path / "stopped", *arguments)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


# ---- shapes of sequences, and what changes nothing ---------------------------------------------------------------------------------


@here
@every_method
def test_the_size_of_test_batches_changes_no_number(method, cli, tmp_path):
    for name, size in (("one", 256), ("other", 5)):
        finish(cli, tmp_path / name, *toy_arguments(method), f"trainer.eval_batch_size={size}")
    assert_close(tmp_path / "one", tmp_path / "other")


@here
@every_method
def test_batches_come_in_parts(method, cli, tmp_path):
    steps = {}
    for parts in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            steps[parts] = count_steps(patch)
            finish(cli, tmp_path / str(parts), *by_image(method), f"trainer.grad_accumulation={parts}")
    assert steps[3] == steps[1]
    # To iCaRL toy images look so alike that rounding (1e-7 of the class means) decides between the nearest means.
    assert_close(tmp_path / "3", tmp_path / "1", same_answers=method != "icarl")


def by_image(method: str) -> list[str]:
    """Arguments of a toy run in which it makes no difference what a batch is cut into.

    Without the losses that compare the images of a batch. With SGD: Adam makes much of a rounding where a gradient is almost zero, and
    nothing of a gradient that is twice too large.
    """
    settings = compose_config(f"method={method}").method
    without = [f"method.{key}=0" for key in settings if key in ("contrast", "triplet")]
    return [*toy_arguments(method), *without, "optimizer=sgd", "optimizer.lr=0.02"]


def count_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of images of every training step."""
    steps: list[int] = []
    original = Trainer._step

    def step(self: Trainer, method: Any, optimizer: Any, x: torch.Tensor, *others: Any) -> bool:
        steps.append(len(x))
        stop = original(self, method, optimizer, x, *others)
        assert len(method.sample_ids) == len(x)
        return stop

    patch.setattr(Trainer, "_step", step)
    return steps


@here
@every_method
def test_half_precision(method, cli, tmp_path):
    found = finish(cli, tmp_path, *toy_arguments(method), "trainer.precision=bf16")
    assert 0 <= found["last_accuracy"] <= 100
    for name, value in weights(tmp_path).items():
        assert value.isfinite().all() and value.dtype is not torch.bfloat16, name


@here
@every_method
def test_a_sixth_task_is_added_to_five_of_one_class_and_one_epoch(method, cli, tmp_path):
    images, folder = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    arguments = [*toy_arguments(method), "dataset._target_=toy.growing", f"dataset.root={images}", "trainer.epochs=1"]
    (images / "num_classes").write_text("5")
    finish(cli, folder, *arguments, "dataset.num_tasks=5")
    first = {name: read_matrix(folder / name) for name in MATRICES}
    (images / "num_classes").write_text("6")
    if num_rows(folder) == 1:  # all tasks at once
        said = cli(*arguments, "dataset.num_tasks=6", f"output_dir={folder}")
        assert said.code == 1 and "holds a run that learned all its classes at once, so it cannot go on with more" in said.err
        return
    finish(cli, folder, *arguments, "dataset.num_tasks=6")
    assert num_rows(folder) == 6
    for name in MATRICES:
        np.testing.assert_array_equal(read_matrix(folder / name)[:5, :5], first[name])
    assert all(value.isfinite().all() for value in weights(folder).values())


# ---- several processes -------------------------------------------------------------------------------------------------------------


@here
@every_method
def test_two_processes_do_what_one_does(method, cli, tmp_path):
    """Of the sixty images of a task the last is a batch of its own, and one of two processes gets nothing of it."""
    arguments = [*by_image(method), *TINY_VIT, "+dataset.options.train=30", "trainer.batch_size=59"]
    for name, processes in (("one", 1), ("two", 2)):
        finish(cli, tmp_path / name, *arguments, f"trainer.num_devices={processes}")
    assert_close(tmp_path / "two", tmp_path / "one")


# ---- real, if small, runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_cores() -> Iterator[None]:
    """As a user's run has them, and no other test."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@here
@every_method
@pytest.mark.usefixtures("all_cores")
def test_ten_tasks_of_digits_take_less_than_two_minutes(method, cli, tmp_path):
    arguments = ["dataset=digits_5task", "dataset.num_tasks=10", "trainer.epochs=1", "trainer.device=cpu", "trainer.progress=false"]
    found = finish(cli, tmp_path, f"method={method}", *arguments)
    assert num_rows(tmp_path) == (1 if method == "joint" else 10)
    assert found["wall_seconds"]["total"] < 120


# ---- a sweep over all --------------------------------------------------------------------------------------------------------------


def test_a_sweep_over_all_methods(tmp_path):
    """On digits, with the shipped backbone and the methods' own tunings."""
    arguments = ["debug=default", "trainer.progress=false", "trainer.device=cpu", f"hydra.sweep.dir={tmp_path}"]
    done = train_py("-m", "method=glob(*)", *arguments, timeout=1100)
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(file.read_text())["method"] for file in tmp_path.glob("*/summary.json"))
    assert found == METHODS
