"""The run folder: its lock, and what tells two configurations apart."""

import multiprocessing
from pathlib import Path

import pytest

from inflora.checkpoint import CheckpointError
from inflora.run_folder import config_differences, hold


def hold_lock(path: str, ready, release) -> None:
    with hold(Path(path)):
        ready.set()
        release.wait(60)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inflora.run_folder"])
    run = tmp_path / "run"
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(str(run), ready, release))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(CheckpointError, match=r"another process is at work in .*run; wait until it ends, or choose another output_dir"),
        hold(run),
    ):
        pass
    process.kill()  # the lock dies with its process
    process.join()
    with hold(run):
        assert (run / ".lock").exists()
    with hold(run):
        pass


def test_the_lock_is_released_by_an_error(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        _ = 1 / 0
    with hold(tmp_path):
        pass


def test_config_differences():
    old = {"seed": 0, "method": {"rank": 4, "blocks": [0, 1], "extra": {}}, "tracker": {"mode": "a"}, "optimizer": {"lr": 0.1}, "gone": 1}
    new = {"seed": 0, "method": {"rank": 8, "blocks": [0, 2], "extra": {}}, "tracker": {"mode": "b"}, "optimizer": None, "came": 1}
    assert config_differences(old, old, set()) == []
    assert config_differences(old, new, set()) == [
        "came",
        "gone",
        "method.blocks",
        "method.rank",
        "optimizer",
        "optimizer.lr",
        "tracker.mode",
    ]
    assert config_differences(old, new, {"tracker", "came", "gone", "method.rank", "optimizer"}) == ["method.blocks"]
    assert config_differences({"methods": 1}, {"methods": 2}, {"method"}) == ["methods"]
