"""Real processes that are killed, stopped and started again: the durable half of the promise. All of it is slow."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_VIT, compose_config, files_of, read_events, results, train_py

from inflora.checkpoint import CheckpointError, CheckpointFolder
from inflora.run import run
from inflora.run_folder import hold
from inflora.trackers import read_matrix

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes on a busy machine

DIGITS = [
    *TINY_VIT,
    "dataset.max_train_per_class=40",
    "dataset.max_test_per_class=10",
    "trainer.epochs=3",
    "trainer.batch_size=16",
    "trainer.device=cpu",
    "trainer.progress=false",
    "optimizer.lr=5e-3",
    "optimizer.head_lr=5e-3",
]
"""Digits in five tasks: 15 batches a task, 75 in all."""

TWO = ["trainer.num_devices=2"]


def start(*arguments: str) -> subprocess.Popen[str]:
    """`python train.py` in a session of its own, so that a test can signal it and its children as a terminal would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True)


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, with whatever is left of the process and its children killed at the end of the test."""
    processes = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        processes.append(start(*arguments))
        return processes[-1]

    yield begin
    for process in processes:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def num_checkpoints(folder: Path) -> int:
    """The number of the newest checkpoint."""
    return max((int(path.name.split("-")[0]) for path in (folder / "checkpoints").glob("[0-9]*.json")), default=0)


def run_to_end(*arguments: str) -> None:
    done = train_py(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_to_end(*DIGITS, f"output_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole of two") / "run"
    run_to_end(*DIGITS, *TWO, f"output_dir={folder}")
    return folder


# ---- one process -------------------------------------------------------------------------------------------------------------------


def test_killed_five_times_a_run_ends_with_the_same_numbers(tmp_path, started):
    moments = random.Random(0)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    long = [*DIGITS, "trainer.epochs=12"]
    run_to_end(*long, f"output_dir={whole}")
    for kill in range(5):
        process = started(*long, f"output_dir={folder}")
        before = num_checkpoints(folder)
        wait_until(lambda before=before: num_checkpoints(folder) >= before + 2)  # 65 in all: every start gets a little further
        time.sleep(moments.uniform(0, 0.2))  # a few checkpoints on a fast machine, a part of one on a slow one
        process.kill()
        process.wait()
        assert not (folder / "summary.json").exists(), f"the run had ended before kill {kill}"
    run_to_end(*long, f"output_dir={folder}")
    assert results(folder) == results(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_a_run_says_how_to_go_on(whole, tmp_path, started, number):
    folder = tmp_path / "run"
    process = started(*DIGITS, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 6)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Stopped; everything so far is saved. To continue:" in said
    command = said.strip().splitlines()[-1].split()
    assert command[1:3] == [str(ROOT / "train.py"), f"output_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)  # as it is printed, interpreter included
    assert results(folder) == results(whole)


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(whole, tmp_path, started):
    folder = tmp_path / "run"
    first = started(*DIGITS, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 1)
    first.send_signal(signal.SIGSTOP)  # it shall not end before the second one is there
    second = train_py(*DIGITS, f"output_dir={folder}")
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"error: another process is at work in {folder}; wait until it ends, or choose another output_dir" in second.stderr
    _, said = first.communicate()
    assert first.returncode == 0, said
    assert results(folder) == results(whole)


# ---- two processes -----------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = CheckpointFolder(folder / "checkpoints").latest()
    assert last is not None
    return last["method"]["tensors"]


def assert_close(folder: Path, other: Path) -> None:
    """Weights within 1e-4 in norm (Adam makes more of a rounding here and there), the same predictions, and what was counted."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    for name in ("accuracy_matrix.csv", "task_aware_matrix.csv"):
        torch.testing.assert_close(
            torch.from_numpy(read_matrix(folder / name)), torch.from_numpy(read_matrix(other / name)), rtol=0, atol=1e-3, equal_nan=True
        )
    for one, two in zip(read_events(folder, "epoch"), read_events(other, "epoch"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["training_accuracy"] == pytest.approx(two["training_accuracy"], abs=0.5)


LONELY = "trainer.batch_size=11"
"""Of twelve images of a task the last is a batch of its own, and one of two processes gets nothing of it."""

TOYS = ["dataset._target_=toy.tiny", "dataset.num_tasks=3", "dataset.transform=shift_flip", *TINY_VIT, *DIGITS[5:], "trainer.epochs=2"]


@pytest.mark.parametrize(
    "overrides",
    [
        # With seed 0, one number's gradient is nothing but rounding in one step, and Adam makes a whole step of it.
        ["method=inflora", "method.rank=4", "trainer.batch_size=5", "seed=1"],
        ["method=inflora", "method.rank=4", LONELY],
        ["method=sequential", "method.rank=4", "optimizer=sgd", "trainer.grad_clip=1", LONELY],
        ["method=joint", "method.rank=4", "trainer.batch_size=5"],
        ["method=linear_probe", "method._target_=toy.TwoSteps", LONELY],
        ["method=linear_probe", "method._target_=toy.Frozen", "trainer.batch_size=5"],
    ],
)
def test_two_processes_do_what_one_does(overrides, tmp_path, no_report):
    cfg = compose_config(*TOYS, *overrides, "output_dir=later")
    for name, processes in (("one", 1), ("two", 2)):
        cfg.output_dir, cfg.trainer.num_devices = str(tmp_path / name), processes
        run(cfg)
    assert_close(tmp_path / "two", tmp_path / "one")


def test_two_processes_on_digits(whole, whole_of_two):
    assert_close(whole_of_two, whole)


def test_two_processes_go_on_where_one_stopped_and_the_other_way_round(whole, tmp_path, started):
    folder = tmp_path / "run"
    process = started(*DIGITS, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 6)
    process.terminate()
    process.communicate()
    process = started(*DIGITS, *TWO, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 12)
    process.terminate()
    process.communicate()
    run_to_end(*DIGITS, f"output_dir={folder}")
    assert_close(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_together(whole_of_two, tmp_path, started, number):
    """SIGINT goes to all, as from a terminal; SIGTERM to the first process alone, as from `kill` or a scheduler."""
    folder = tmp_path / "run"
    process = started(*DIGITS, *TWO, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 6)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Stopped; everything so far is saved. To continue:" in said
    wait_until(lambda: not members(process.pid), seconds=30)
    run_to_end(*DIGITS, *TWO, f"output_dir={folder}")
    assert results(folder) == results(whole_of_two)


def is_free(folder: Path) -> bool:
    try:
        with hold(folder):
            return True
    except CheckpointError:
        return False


def test_the_first_of_two_processes_killed_outright(whole_of_two, tmp_path, started):
    """Its children notice, save and end; until then the folder is theirs, and afterwards nothing in it changes."""
    folder = tmp_path / "run"
    process = started(*DIGITS, *TWO, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 6)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(CheckpointError, match="another process is at work"), hold(folder):
        pass
    wait_until(lambda: is_free(folder))
    left = files_of(folder)
    wait_until(lambda: not members(process.pid))
    assert files_of(folder) == left
    run_to_end(*DIGITS, *TWO, f"output_dir={folder}")
    assert results(folder) == results(whole_of_two)


def test_one_of_two_processes_killed(whole_of_two, tmp_path, started):
    folder = tmp_path / "run"
    process = started(*DIGITS, *TWO, f"output_dir={folder}")
    wait_until(lambda: num_checkpoints(folder) >= 6)
    child = max(pid for pid in members(process.pid) if pid != process.pid)
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    wait_until(lambda: not members(process.pid), seconds=30)
    run_to_end(*DIGITS, *TWO, f"output_dir={folder}")
    assert results(folder) == results(whole_of_two)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["dataset.num_tasks=11"], "dataset.num_tasks=11 does not fit 10 classes; choose 1..10"),
        (["method.rank=65"], "method.rank=65 exceeds the layer's 64 inputs; choose 1..64"),
        (["method=linear_probe", "optimizer=sgd", "optimizer.head_lr=1e38"], "lower optimizer.lr and optimizer.head_lr"),
        (["tracker=wandb", "tracker.mode=of"], "tracker.mode=of is not known; choose online, offline, disabled or null"),
    ],
)
def test_a_fault_in_two_processes_is_one_sentence(arguments, sentence, tmp_path, started):
    process = started(*DIGITS, *TWO, *arguments, f"output_dir={tmp_path}")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.count("error:") == 1 and sentence in said
    assert "Traceback" not in said
    wait_until(lambda: not members(process.pid), seconds=30)
