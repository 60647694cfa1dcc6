"""The records of a run, and the facts about code and machine that go into its summary."""

import json
import subprocess
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inflora import checkpoint, results
from inflora.results import Records


def test_records_fill_rows():
    records = Records(3, torch.device("cpu"))
    records.add(0, np.array([[0.5, np.nan, np.nan], [0.75, np.nan, np.nan], [0.6, np.nan, np.nan]]))
    records.add(1, np.array([[0.4, 1.0, np.nan], [0.5, 1.0, np.nan], [0.7, 0.9, np.nan]]))
    np.testing.assert_array_equal(records.matrices[0], [[0.5, np.nan, np.nan], [0.4, 1.0, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(records.matrices[1, 1], [0.5, 1.0, np.nan])
    np.testing.assert_array_equal(records.matrices[2, 1], [0.7, 0.9, np.nan])


def test_the_latest_row_weighs_tasks_by_their_images():
    records = Records(2, torch.device("cpu"))
    records.add(0, np.array([[0.5, np.nan], [0.5, np.nan], [0.5, np.nan]]))
    records.add(1, np.array([[0.4, 1.0], [0.5, 1.0], [0.7, 0.9]]))
    latest = records.latest([30, 10])
    assert latest == {
        "accuracy": pytest.approx(100 * (0.4 * 0.75 + 1.0 * 0.25)),
        "task_aware_accuracy": pytest.approx(62.5),
        "task_id_accuracy": pytest.approx(75.0),
        "accuracy_per_task": pytest.approx([40.0, 100.0]),
    }


def test_records_survive_a_checkpoint(tmp_path):
    records = Records(2, torch.device("cpu"))
    records.add(0, np.array([[1 / 3, np.nan]] * 3))
    records.trainable_parameters.append(7)
    with records.clock("train"):
        pass
    checkpoint.save(tmp_path / "records.safetensors", records.state_dict())
    longer = Records(3, torch.device("cpu"))
    longer.load_state_dict(checkpoint.load(tmp_path / "records.safetensors"))
    np.testing.assert_array_equal(longer.matrices[0, 0], [1 / 3, np.nan, np.nan])
    assert np.isnan(longer.matrices[:, 1:]).all()
    assert longer.trainable_parameters == [7]
    assert longer.wall_seconds == records.wall_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_memory_of_an_earlier_part_of_the_run_counts(tmp_path):
    records = Records(1, torch.device("cpu"))
    state = records.state_dict()
    assert 0 < state["peak_memory_bytes"] < 2**60
    later = Records(1, torch.device("cpu"))
    later.load_state_dict(state | {"peak_memory_bytes": 2**60})
    assert later.peak_memory_bytes == later.state_dict()["peak_memory_bytes"] == 2**60


def test_every_part_of_the_run_is_remembered_once(monkeypatch):
    def begin(num_tasks: int, commit: str, state: dict | None = None) -> Records:
        monkeypatch.setattr(results, "git_revision", lambda: {"git_commit": commit, "git_dirty": False})
        records = Records(num_tasks, torch.device("cpu"))
        if state is not None:
            records.load_state_dict(state)
        return records

    first = begin(2, "a")
    again = begin(2, "a", first.state_dict())
    assert again.history == first.history
    later = begin(3, "a", begin(2, "b", again.state_dict()).state_dict())
    assert [(part["num_tasks"], part["git_commit"]) for part in later.history] == [(2, "a"), (2, "b"), (3, "a")]
    assert all(part["device"].endswith("threads") and part["versions"] == results.package_versions() for part in later.history)


def test_clocks_count_what_goes_on_inside_them(clock):
    records = Records(1, torch.device("cpu"))
    clock.now += 1
    with records.clock("subspace"):
        clock.now += 2
    with records.clock("train"):
        clock.now += 4
        assert records.timings() == {"subspace": 2, "train": 4, "evaluate": 0, "other": 1, "total": 7}
        clock.now += 8
    with pytest.raises(ZeroDivisionError), records.clock("evaluate"):
        clock.now += 16
        raise ZeroDivisionError
    assert records.timings() == {"subspace": 2, "train": 12, "evaluate": 16, "other": 1, "total": 31}


def test_clocks_go_on_where_a_checkpoint_was_taken(clock):
    records = Records(1, torch.device("cpu"))
    with records.clock("train"):
        clock.now += 5
        saved = records.state_dict()
        clock.now += 100  # lost with the process
    clock.now += 1000
    later = Records(1, torch.device("cpu"))
    clock.now += 1
    later.load_state_dict(saved)
    with later.clock("train"):
        clock.now += 3
    clock.now += 2
    assert later.timings() == {"subspace": 0, "train": 8, "evaluate": 0, "other": 2, "total": 10}


def test_numbers_in_a_nest_are_counted():
    state = {"a": torch.zeros(2, 3), "b": [torch.zeros(4), {"c": (torch.zeros(()), 5, "text", None)}], "d": {}}
    assert results.count_numbers(state) == 6 + 4 + 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can start counting anew")
def test_peak_memory_is_that_of_the_run_in_bytes():
    cpu = torch.device("cpu")
    size = 400_000_000
    results.reset_peak_memory(cpu)
    before = results.peak_memory_bytes(cpu)
    block = np.ones(size, np.uint8)
    assert results.peak_memory_bytes(cpu) - before == pytest.approx(size, rel=0.1)
    del block
    assert results.peak_memory_bytes(cpu) - before == pytest.approx(size, rel=0.1)
    results.reset_peak_memory(cpu)
    assert results.peak_memory_bytes(cpu) - before < 0.1 * size


def test_versions_name_what_computes(monkeypatch):
    found = results.package_versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"].count(".") == 2
    known = results.version

    def version(name: str) -> str:
        if name == "pillow":
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(results, "version", version)
    assert found.keys() - results.package_versions().keys() == {"pillow"}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inflora").mkdir()
    (tmp_path / "inflora" / "results.py").write_text("code\n")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "inflora" / "results.py"))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_the_clone(clone):
    assert results.git_revision() == {"git_commit": None, "git_dirty": None}, "an installed package has none"
    git(clone, "init", "-q")
    assert results.git_revision() == {"git_commit": None, "git_dirty": None}, "nor has an empty repository"
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "first")
    commit = git(clone, "rev-parse", "HEAD")
    assert results.git_revision() == {"git_commit": commit, "git_dirty": False}
    (clone / "report").mkdir()
    (clone / "report" / "report.md").write_text("no code\n")
    assert results.git_revision() == {"git_commit": commit, "git_dirty": False}
    (clone / "inflora" / "results.py").write_text("changed\n")
    assert results.git_revision() == {"git_commit": commit, "git_dirty": True}


def test_commit_without_git(clone, monkeypatch):
    git(clone, "init", "-q")
    monkeypatch.setenv("PATH", str(clone))
    assert results.git_revision() == {"git_commit": None, "git_dirty": None}


def test_a_summary_is_read_back(tmp_path):
    assert results.read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 3}))
    assert results.read_summary(tmp_path) == {"seed": 3}
