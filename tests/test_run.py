"""Whole runs on the toy: what a folder holds, when it is continued, looked up or refused, and that nothing else is left behind."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy
import yaml
from helpers import METHODS, ROOT, files_of, num_rows, read_events, results, run_toy, toy_config, train_py
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf
from torch._dynamo.utils import counters
from torch.multiprocessing import ProcessExitedException

from inflora import progress, run_folder
from inflora.checkpoint import CheckpointFolder
from inflora.config import ConfigurationError
from inflora.data.datasets import hash_paths, same_everywhere
from inflora.evaluate import evaluate_run
from inflora.export import export_run
from inflora.methods.linear_probe import LinearProbe
from inflora.run import Origin, _process, _spawned, _stop_signals_handed_on, make_fabric, run, started_by_launcher
from inflora.trackers import read_matrix
from inflora.trainer import Interrupted, Trainer

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of InfLoRA. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inflora.run.report.write", lambda folders, out: out / "report.html")
        run_toy(folder)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def num_backbone() -> int:
    return sum(parameter.numel() for parameter in toy.toy_vit().parameters())


# ---- the folder --------------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # with the report
    folder = tmp_path / "made" / "with" / "parents"
    found = run_toy(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".hydra", ".lock", "accuracy_matrix.csv", "checkpoints", "config.yaml", "metrics.jsonl", "report", "run.log", "summary.json",
        "task_aware_matrix.csv",
    }  # fmt: skip
    assert (folder / "report" / "report.html").stat().st_size > 1000
    assert summary_of(folder) == found
    printed = capsys.readouterr().out
    assert f"{found['last_accuracy']:.2f}" in printed
    assert str(folder / "report" / "report.html") in printed


def test_the_configuration_is_written_resolved(finished):
    text = (finished / "config.yaml").read_text()
    assert "${" not in text and "???" not in text
    written = yaml.safe_load(text)
    assert written["optimizer"]["head_lr"] == 0.005
    assert written["output_dir"] == str(finished)


def test_events(finished):
    events = read_events(finished)
    one_task = ["epoch", "epoch", "task"]
    assert [event["event"] for event in events] == ["run", *one_task * 3, "summary"]
    start = events[0]
    assert start["tasks"] == [["class_00", "class_01"], ["class_02", "class_03"], ["class_04", "class_05"]]
    assert (start["training_images"], start["test_counts"], start["epochs"], start["steps"]) == ([12] * 3, [8] * 3, 2, 12)
    for number, epoch in enumerate(read_events(finished, "epoch")):
        assert (epoch["task"], epoch["epoch"]) == divmod(number, 2)
        assert epoch["loss"] > 0 and 0 <= epoch["training_accuracy"] <= 100 and epoch["images_per_second"] > 0
        assert epoch["lr"] == 0.005
    for number, task in enumerate(read_events(finished, "task")):
        assert task["task"] == number and len(task["accuracy_per_task"]) == number + 1
        assert len(task["protected_dimensions"]) == 2
        shape = None if number == 0 else (number, 2)
        assert (None if task["interference"] is None else np.shape(task["interference"])) == shape
        assert task["peak_memory_bytes"] > 0
    tasks, end = read_events(finished, "task"), summary_of(finished)
    assert tasks[-1]["stored_parameters"] == end["stored_parameters"] > tasks[0]["stored_parameters"] > 0
    elapsed = [task["wall_seconds"]["total"] for task in tasks]  # since the run began
    assert 0 < elapsed[0] < elapsed[1] < elapsed[2] <= end["wall_seconds"]["total"]
    assert {**events[-1], **summary_of(finished)} == events[-1]


def test_the_matrices(finished):
    lines = (finished / "accuracy_matrix.csv").read_text().splitlines()
    assert lines[0] == "task_0,task_1,task_2"
    assert [[len(cell.partition(".")[2]) for cell in line.split(",")] for line in lines[1:]] == [[6, 0, 0], [6, 6, 0], [6, 6, 6]]
    accuracy, task_aware = (read_matrix(finished / name) for name in ("accuracy_matrix.csv", "task_aware_matrix.csv"))
    measured = np.tril(np.ones((3, 3), bool))
    assert (task_aware[measured] >= accuracy[measured]).all()
    events = read_events(finished, "task")
    for row, event in zip(accuracy, events, strict=True):
        np.testing.assert_allclose(event["accuracy_per_task"], 100 * row[: event["task"] + 1], atol=1e-6)


def test_the_summary(finished):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    found = json.loads((finished / "summary.json").read_text(), parse_constant=refuse)
    expected = {
        "dataset": "tiny",
        "method": "inflora",
        "backbone": "vit_toy.test",
        "backbone_tag": "vit_toy.test",
        "seed": 0,
        "num_tasks": 3,
        "task_sizes": [2, 2, 2],
        "class_order": [0, 1, 2, 3, 4, 5],
        "test_counts": [8, 8, 8],
        "transform": "shift_flip",
        "normalize": "timm",
        "split": "toy",
        "applied_files": [],
        "published": None,
        "trainable_parameters": 2 * 2 * 2 * 32 + 66,
        "trainable_parameters_per_task": [322] * 3,
    }
    assert {key: found[key] for key in expected} == expected
    accuracy = read_matrix(finished / "accuracy_matrix.csv")
    curve = [100 * accuracy[t, : t + 1].mean() for t in range(3)]
    np.testing.assert_allclose(found["accuracy_curve"], curve, atol=1e-5)
    assert found["last_accuracy"] == found["accuracy_curve"][-1]
    np.testing.assert_allclose(found["average_accuracy"], np.mean(curve), atol=1e-5)
    assert found["total_parameters"] == num_backbone() + 3 * 66
    assert 3 * 66 < found["stored_parameters"] <= 3 * 66 + 2 * 32 * 32 // 2, "heads, and at most half a matrix per block"
    assert found["peak_memory_bytes"] > 10_000_000
    assert {
        "last_accuracy_macro",
        "average_accuracy_macro",
        "forgetting",
        "backward_transfer",
        "task_aware_accuracy",
        "task_id_accuracy",
    } <= (found.keys())
    splits = toy.tiny(Path())
    assert (found["train_hash"], found["test_hash"]) == (hash_paths(splits.train.paths), hash_paths(splits.test.paths))
    assert len(found["weights_sha256"]) == 64
    assert {"torch", "timm", "numpy", "inflora", "python"} <= found["versions"].keys()
    assert found["git_commit"] is None or len(found["git_commit"]) == 40
    assert found["device"]


def test_stored_parameters_of_seqlora_count_its_branch(tmp_path):
    found = run_toy(tmp_path, "method=sequential")
    assert found["stored_parameters"] == 3 * 66 + 2 * 2 * (2 * 32 + 2 * 32)
    assert found["total_parameters"] == num_backbone() + found["stored_parameters"]


def test_the_timings_add_up(tmp_path):
    began = time.monotonic()
    wall = run_toy(tmp_path)["wall_seconds"]
    elapsed = time.monotonic() - began
    assert list(wall) == ["subspace", "train", "evaluate", "other", "total"]
    assert min(wall.values()) > 0
    assert wall["total"] == pytest.approx(sum(wall.values()) - wall["total"])
    assert wall["total"] <= elapsed


def test_two_checkpoints_what_they_follow_and_the_start_are_kept(finished):
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert [name.partition("-")[2] for name in names[:6]] == [
        "task1.json", "task1.safetensors", "task2_epoch2_step0.json", "task2_epoch2_step0.safetensors", "task2.json", "task2.safetensors"
    ]  # fmt: skip
    assert names[6:] == ["base.json", "base.safetensors"]


def test_the_log_says_what_the_run_does(finished):
    text = (finished / "run.log").read_text()
    assert "inflora on tiny, vit_toy.test (random weights: vit_toy.test)" in text
    assert "3 tasks, 2 classes each; 36 training and 24 test images" in text
    assert "2 epochs a stage, batches of 8: 12 steps on cpu in precision 32" in text
    assert "no published recipe for this pair" in text
    assert "task 2: 2 classes, 12 images; trains 256 branch + 66 head parameters" in text
    assert "over all seen classes" in text


def test_the_log_names_uneven_tasks_and_applied_files(tmp_path):
    cfg = toy_config(tmp_path, "method=linear_probe", "dataset.task_sizes=[3,1,2]", "trainer.epochs=1")
    run(cfg, Origin({"method": "m", "dataset": "d", "backbone": "b"}, ["recipe/d_m"], {"overrides.yaml": "- method=m\n"}))
    text = (tmp_path / "run.log").read_text()
    assert "m on d, b" in text
    assert "classes 3 1 2" in text
    assert "applied: recipe/d_m\n" in text
    assert (tmp_path / ".hydra" / "overrides.yaml").read_text() == "- method=m\n"
    assert summary_of(tmp_path)["applied_files"] == ["recipe/d_m"]


def test_a_recipe_is_told_with_what_was_published_and_typed(tmp_path):
    published = ["published.source=A et al.", "published.average_accuracy=81.5", "published.differs=[other weights]"]
    cfg = toy_config(tmp_path, "method=linear_probe", "trainer.epochs=1", *published)
    run(cfg, Origin({"method": "m", "dataset": "d", "backbone": "b"}, ["recipe/d_m"], changes=["trainer.epochs=1"]))
    said = [line.split("INFO ")[1] for line in (tmp_path / "run.log").read_text().splitlines()]
    start = said.index("recipe: A et al.")
    assert said[start + 1 : start + 4] == ["published: average 81.50", "otherwise there: other weights", "changed here: trainer.epochs=1"]
    expected = {
        "source": "A et al.", "figures": None, "last_accuracy": None, "average_accuracy": 81.5, "differs": ["other weights"],
        "changes": ["trainer.epochs=1"],
    }  # fmt: skip
    assert summary_of(tmp_path)["published"] == read_events(tmp_path, "run")[0]["published"] == expected
    assert run(toy_config(tmp_path / "python", "method=linear_probe", "trainer.epochs=1", *published))["published"]["changes"] is None
    again = toy_config(tmp_path, "method=linear_probe", "trainer.epochs=1", "published.source=B et al.")
    assert run(again)["published"] == expected, "what a recipe says of itself makes no other run"


@pytest.mark.slow  # test_methods.py takes each through its stages quickly, test_methods_slow.py through the command line
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, tmp_path):
    found = run_toy(tmp_path, f"method={method}")
    target = toy_config(tmp_path, f"method={method}").method._target_  # presets share a class, which is all that a composed run can name
    assert found["method"] == target.split(".")[-2]
    assert found["last_accuracy"] is not None
    assert num_rows(tmp_path) == (1 if method == "joint" else 3)


@pytest.mark.parametrize("target, trained", [("toy.Frozen", 0), ("toy.TwoSteps", 66)])
def test_unusual_methods_run(target, trained, tmp_path):
    found = run_toy(tmp_path, "method=linear_probe", f"method._target_={target}")
    assert found["trainable_parameters"] == trained
    assert found["task_aware_accuracy"] > 50
    losses = read_events(tmp_path, "epoch")
    assert len(losses) == (6 if trained else 0)


def test_what_trains_is_told_by_the_task_that_trains_most(tmp_path):
    """APER trains in the first task only."""
    found = run_toy(tmp_path, "method=aper", "trainer.epochs=1")
    first, *later = found["trainable_parameters_per_task"]
    assert later == [0, 0] and found["trainable_parameters"] == first > 0


def test_joint_fills_the_last_row_only(tmp_path):
    found = run_toy(tmp_path, "method=joint", "trainer.epochs=8")
    accuracy = read_matrix(tmp_path / "accuracy_matrix.csv")
    assert np.isnan(accuracy[:2]).all() and not np.isnan(accuracy[2]).any()
    assert found["accuracy_curve"][:2] == [None, None]
    assert found["forgetting"] is None and found["backward_transfer"] is None
    assert found["num_tasks"] == 3
    (event,) = read_events(tmp_path, "task")
    assert len(event["accuracy_per_task"]) == 3


def test_learning_raises_accuracy(tmp_path):
    """The loop trains for real: a linear probe on the toy's patterns ends far above chance (17 %)."""
    assert run_toy(tmp_path, "method=linear_probe", "trainer.epochs=10", "optimizer.lr=0.02")["task_aware_accuracy"] > 80


# ---- settings ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "timm"])
def test_images_arrive_as_normalize_says(normalize, tmp_path, monkeypatch):
    lowest, original = [], LinearProbe.loss
    monkeypatch.setattr(LinearProbe, "loss", lambda self, x, y: lowest.append(x.min().item()) or original(self, x, y))
    run_toy(tmp_path / "run", "method=linear_probe", "trainer.epochs=1", f"dataset.normalize={normalize}")
    assert (min(lowest) < 0) == (normalize == "timm")
    export_run(tmp_path / "run", tmp_path / "exported")
    preprocessing = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (preprocessing["mean"], preprocessing["std"]) == (([0.5] * 3, [0.5] * 3) if normalize == "timm" else ([0.0] * 3, [1.0] * 3))


def test_subsets_of_the_images_are_those_of_the_configuration(tmp_path):
    subsets = ["dataset.validation_fraction=0.5", "dataset.max_train_per_class=2", "dataset.max_test_per_class=1"]
    found = run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1", *subsets)
    assert found["split"] == "toy validation:0.5" and found["test_counts"] == [2, 2, 2]
    assert read_events(tmp_path, "run")[0]["training_images"] == [4, 4, 4]


def test_the_split_reaches_the_data_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(toy, "tiny", lambda root, *, split, tiny=toy.tiny: asked.append((root, split)) or tiny(root))
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1", "dataset.split=stratified:5", "dataset.root=somewhere")
    assert asked == [(Path("somewhere"), "stratified:5")]


def test_the_seed_of_the_run_moves_class_orders_that_say_so(tmp_path):
    def order(seed: int, spec: str) -> list[int]:
        folder = tmp_path / f"{seed} {spec}"
        return run_toy(folder, "method=linear_probe", "trainer.epochs=1", f"seed={seed}", f"dataset.class_order={spec}")["class_order"]

    assert order(1, "numpy:1993+seed") == order(0, "numpy:1994") != order(0, "numpy:1993+seed")


# ---- the same again ----------------------------------------------------------------------------------------------------------------


def test_equal_runs_give_equal_results(finished, tmp_path):
    """Whatever was drawn from the global generators before."""
    torch.manual_seed(time.time_ns() % 2**32)
    random.seed()
    np.random.seed()
    run_toy(tmp_path / "again")
    run_toy(tmp_path / "other", "seed=1")
    again, other = results(tmp_path / "again"), results(tmp_path / "other")
    assert again == results(finished)
    assert other["weights"] != again["weights"]


def test_what_changes_no_result(finished, tmp_path):
    run_toy(tmp_path, "trainer.eval_batch_size=3", "trainer.num_workers=0")
    ours, theirs = results(tmp_path), results(finished)
    assert ours["matrices"] == theirs["matrices"]
    assert ours["weights"] == theirs["weights"]


def test_a_finished_run_is_looked_up(finished, capsys):
    before = files_of(finished)
    found = run_toy(finished)
    assert files_of(finished) == before
    assert found == summary_of(finished)
    printed = capsys.readouterr().out
    assert f"This run is finished: {finished}" in printed
    assert f"{found['last_accuracy']:.2f}" in printed


def test_one_of_several_processes_looks_a_finished_run_up_aloud(finished, tmp_path, capsys):
    """The others may not see its folder: they are told."""
    plain: Any = OmegaConf.to_container(toy_config(finished, "trainer.num_devices=2"), resolve=True)
    before, told = files_of(finished), []
    first: Any = SimpleNamespace(broadcast=lambda own: told.append(own) or own, is_global_zero=True, world_size=2)
    assert _process(first, plain, Origin({})) == summary_of(finished)
    assert "This run is finished" in capsys.readouterr().out
    assert told == [str(finished), summary_of(finished)]
    other: Any = SimpleNamespace(broadcast=lambda own: told.pop(0), is_global_zero=False, world_size=2)
    assert _process(other, plain | {"output_dir": str(tmp_path / "nowhere")}, Origin({})) == summary_of(finished)
    assert capsys.readouterr().out == "" and not (tmp_path / "nowhere").exists()
    assert files_of(finished) == before


def test_a_run_that_ends_while_its_folder_is_waited_for_is_looked_up(finished, monkeypatch):
    """Between the first look and the lock, another process may have been at work in the folder."""
    plain: Any = OmegaConf.to_container(toy_config(finished), resolve=True)
    looks = iter([None, run_folder.look_up(finished, plain)])
    monkeypatch.setattr(run_folder, "look_up", lambda *_: next(looks))
    fabric: Any = SimpleNamespace(broadcast=lambda own: own, is_global_zero=True, world_size=1)
    assert _process(fabric, plain, Origin({})) == summary_of(finished)


def test_no_configuration_is_written_before_all_processes_can_begin(tmp_path, monkeypatch):
    """Else the corrected command would be refused as one of another configuration."""
    meetings = iter(["folder", "log", "parts"])

    @contextmanager
    def with_another_that_fails() -> Iterator[None]:
        yield
        if next(meetings) == "parts":
            raise ValueError("no images on the other machine")

    monkeypatch.setattr("inflora.run.failing_together", with_another_that_fails)
    with pytest.raises(ValueError, match="no images on the other machine"):
        run_toy(tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_a_run_whose_report_a_kill_prevented_says_how_to_write_it(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    run_toy(tmp_path / "run")
    assert f"python -m inflora.report {tmp_path / 'run'} --out {tmp_path / 'run' / 'report'}" in capsys.readouterr().out


def test_a_finished_run_is_looked_up_from_any_machine(finished):
    before = files_of(finished)
    run_toy(finished, "trainer.num_workers=0", "trainer.eval_batch_size=7", "dataset.root=elsewhere", "tracker=tensorboard")
    assert files_of(finished) == before


def test_no_data_set_is_downloaded_to_look_a_run_up(tmp_path, monkeypatch):
    run_toy(tmp_path / "run", "method=linear_probe", "trainer.epochs=1", "dataset.root=here")
    monkeypatch.setattr(toy, "tiny", same_everywhere(lambda *_, **__: pytest.fail("it was loaded")))
    run_toy(tmp_path / "run", "method=linear_probe", "trainer.epochs=1", f"dataset.root={tmp_path}")


def test_a_finished_run_is_no_answer_for_other_images(tmp_path):
    for name, num_classes in (("here", 4), ("copy", 4), ("other", 6)):
        grow(tmp_path / name, num_classes)
    folder, common = tmp_path / "run", ["method=linear_probe", "dataset._target_=toy.growing", "trainer.epochs=1", "dataset.num_tasks=2"]
    run_toy(folder, *common, f"dataset.root={tmp_path / 'here'}")
    before = files_of(folder)
    (tmp_path / "empty").mkdir()
    for root in ("copy", "nowhere", "empty"):
        run_toy(folder, *common, f"dataset.root={tmp_path / root}")
    with pytest.raises(ValueError, match="holds a run over other tasks"):
        run_toy(folder, *common, f"dataset.root={tmp_path / 'other'}")
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "overrides, difference",
    [
        (["trainer.epochs=3"], r"trainer\.epochs \(2 there, 3 here\)"),
        (["seed=4", "method.rank=3"], r"method\.rank \(2 there, 3 here\), seed \(0 there, 4 here\)"),
        (["method=linear_probe"], r"method\._target_ \(.*InfLoRA there, .*LinearProbe here\).* method\.rank \(2 there, nothing here\)"),
        (["dataset.max_train_per_class=3"], r"dataset\.max_train_per_class \(None there, 3 here\)"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused(finished, overrides, difference):
    before = files_of(finished)
    with pytest.raises(
        ValueError, match=f"holds a run of another configuration, which differs in .*{difference}.*; choose another output_dir"
    ):
        run_toy(finished, *overrides)
    assert files_of(finished) == before


def test_never_resume(finished):
    before = files_of(finished)
    with pytest.raises(ValueError, match=r"holds a run already and resume=never; choose another output_dir"):
        run_toy(finished, "resume=never")
    assert files_of(finished) == before


def test_never_resume_starts_in_an_empty_folder(tmp_path):
    run_toy(tmp_path, "resume=never", "method=linear_probe", "trainer.epochs=1")
    assert num_rows(tmp_path) == 3


def test_a_folder_at_work_is_refused(tmp_path):
    from inflora.checkpoint import CheckpointError
    from inflora.run_folder import hold

    with hold(tmp_path), pytest.raises(CheckpointError, match=r"another process is at work in .*; wait until it ends, or choose"):
        run_toy(tmp_path)


# ---- longer sequences --------------------------------------------------------------------------------------------------------------


def grow(root: Path, num_classes: int) -> None:
    root.mkdir(exist_ok=True)
    (root / "num_classes").write_text(str(num_classes))


@pytest.mark.parametrize("method", ["inflora", "linear_probe", "sequential"])
def test_a_finished_run_goes_on_with_further_tasks(method, tmp_path):
    root, folder = tmp_path / "images", tmp_path / "run"
    common = [f"method={method}", "dataset._target_=toy.growing", f"dataset.root={root}", "trainer.epochs=1"]
    grow(root, 4)
    run_toy(folder, *common, "dataset.num_tasks=2")
    short = (folder / "accuracy_matrix.csv").read_text().splitlines()
    grow(root, 6)
    found = run_toy(folder, *common, "dataset.num_tasks=3")
    long = (folder / "accuracy_matrix.csv").read_text().splitlines()
    assert [line.removesuffix(",") for line in long[1:3]] == short[1:]
    assert num_rows(folder) == 3
    assert [part["num_tasks"] for part in found["history"]] == [2, 3]
    assert (found["num_tasks"], len(found["accuracy_curve"]), found["test_counts"]) == (3, 3, [8, 8, 8])
    assert [event["event"] for event in read_events(folder)] == ["run", *["epoch", "task"] * 2, "run", "epoch", "task", "summary"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["dataset"]["num_tasks"] == 3
    if method != "inflora":  # whose thresholds follow the planned number of tasks
        run_toy(tmp_path / "at once", *common, "dataset.num_tasks=3")
        assert results(folder)["weights"] == results(tmp_path / "at once")["weights"]
        assert results(folder)["matrices"] == results(tmp_path / "at once")["matrices"]


def test_a_sequence_that_is_continued_is_not_taken_for_finished(tmp_path, monkeypatch):
    """A kill as soon as the longer configuration is there: the summary of the shorter sequence must be gone by then."""

    class Killed(BaseException):
        pass

    def killed(path: Path, write: Any) -> None:
        write_atomically(path, write)
        raise Killed

    root, folder = tmp_path / "images", tmp_path / "run"
    common = ["method=linear_probe", "dataset._target_=toy.growing", f"dataset.root={root}", "trainer.epochs=1"]
    grow(root, 4)
    run_toy(folder, *common, "dataset.num_tasks=2")
    grow(root, 6)
    write_atomically = run_folder.write_atomically
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder, "write_atomically", killed)
        run_toy(folder, *common, "dataset.num_tasks=3")
    assert len(run_toy(folder, *common, "dataset.num_tasks=3")["accuracy_curve"]) == num_rows(folder) == 3


def test_further_tasks_by_explicit_sizes_and_order(tmp_path):
    root, folder = tmp_path / "images", tmp_path / "run"
    common = ["method=linear_probe", "dataset._target_=toy.growing", f"dataset.root={root}", "trainer.epochs=1"]
    grow(root, 4)
    run_toy(folder, *common, "dataset.task_sizes=[1,3]", "dataset.class_order=[3,0,1,2]")
    grow(root, 6)
    with pytest.raises(ValueError, match=r"holds a run over other tasks: dataset.num_tasks, dataset.task_sizes, dataset.class_order and"):
        run_toy(folder, *common, "dataset.task_sizes=[1,3,2]", "dataset.class_order=[0,3,1,2,4,5]")
    with pytest.raises(ValueError, match=r"holds a run over other tasks"):
        run_toy(folder, *common, "dataset.task_sizes=[1,5]", "dataset.class_order=[3,0,1,2,4,5]")
    found = run_toy(folder, *common, "dataset.task_sizes=[1,3,2]", "dataset.class_order=[3,0,1,2,5,4]")
    assert found["class_order"] == [3, 0, 1, 2, 5, 4]
    assert num_rows(folder) == 3
    with pytest.raises(ValueError, match=r"holds a run over other tasks"):
        grow(root, 4)
        run_toy(folder, *common, "dataset.task_sizes=[1,3]", "dataset.class_order=[3,0,1,2]")


@pytest.mark.parametrize("part", ["train", "test"])
def test_tasks_that_were_begun_keep_their_images(part, tmp_path):
    folder, limit = tmp_path / "run", f"max_{part}_per_class"
    common = ["method=linear_probe", "trainer.epochs=1"]
    run_toy(folder, *common, "dataset.num_tasks=2", f"dataset.{limit}=2")
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(f"{limit}: 2", f"{limit}: 3"))
    with pytest.raises(ValueError, match=r"holds a run on other images: those of the tasks it has begun with must stay the same"):
        run_toy(folder, *common, "dataset.num_tasks=2", f"dataset.{limit}=3")


def test_a_run_does_not_go_on_with_other_weights(tmp_path):
    common = ["method=linear_probe", "trainer.epochs=1"]
    run_toy(tmp_path, *common)
    (tmp_path / "summary.json").unlink()
    events = read_events(tmp_path)
    events[0]["weights"] |= {"source": "package", "sha256": "0" * 64}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(
        ValueError, match=r"holds a run that began with other weights of vit_toy.test, whose file has changed since; choose"
    ):
        run_toy(tmp_path, *common)


def test_joint_does_not_go_on_with_further_tasks(tmp_path):
    root, folder = tmp_path / "images", tmp_path / "run"
    common = ["method=joint", "dataset._target_=toy.growing", f"dataset.root={root}", "trainer.epochs=1"]
    grow(root, 4)
    run_toy(folder, *common, "dataset.num_tasks=2")
    grow(root, 6)
    with pytest.raises(ValueError, match=r"learned all its classes at once, so it cannot go on with more; choose another output_dir"):
        run_toy(folder, *common, "dataset.num_tasks=3")


# ---- nothing else is left behind ---------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    loggers = [logging.getLogger(name) for name in (None, "inflora", "lightning_fabric", "timm")]
    return {
        "logging": [(log.level, list(log.handlers), log.propagate, log.disabled) for log in loggers],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "threads": threading.active_count(),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["inflora", "diverging"])
def test_a_run_leaves_nothing_behind(method, tmp_path):
    before = process_state()
    if method == "inflora":
        run_toy(tmp_path)
    else:
        with pytest.raises(RuntimeError, match=r"the loss is nan at step 1 of task 0, epoch 0"):
            run_toy(tmp_path, *DIVERGING, "+method.task=0", "+method.step=1")
    assert process_state() == before


def test_kernels_that_spoil_numbers_are_not_used(tmp_path, monkeypatch):
    """In training, in a test of a finished run, and in a spawned process, which begins with torch's own settings."""
    honest, seen = torch.nn.Conv2d.forward, []

    def allowed(*_: Any) -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()

    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *args: seen.append(allowed()) or honest(*args))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for work in (lambda: run_toy(tmp_path), lambda: evaluate_run(tmp_path)):
        seen.clear()
        work()
        assert set(seen) == {(False, False)} and allowed() == (True, True)
    monkeypatch.setattr("inflora.run._train", allowed)
    fabric: Any = SimpleNamespace(broadcast=lambda own: own, is_global_zero=False, world_size=1)
    assert _process(fabric, {"output_dir": str(tmp_path)}, Origin({})) == (False, False)


DIVERGING = ["method=linear_probe", "method._target_=toy.Diverging"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["inflora", "sequential"])
def test_a_compiled_run_finds_what_a_plain_one_finds_and_compiles_once(method, tmp_path, monkeypatch):
    whole_batches = "trainer.batch_size=6"  # a shorter last one would make a third graph, for all sizes
    plain = run_toy(tmp_path / "plain", f"method={method}", whole_batches)
    graphs, test = [], Trainer._test

    def counting(self: Trainer, *arguments: Any) -> None:
        test(self, *arguments)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Trainer, "_test", counting)
    torch.compiler.reset()  # sizes that the case before has seen
    counters.clear()
    compiled = run_toy(tmp_path / "compiled", f"method={method}", whole_batches, "trainer.compile=true")
    assert graphs == [2, 2, 2], "one for training and one for testing, whatever the task"
    assert not counters["graph_break"]
    assert compiled["accuracy_curve"] == plain["accuracy_curve"]
    for one, other in zip(*(read_events(tmp_path / name, "epoch") for name in ("plain", "compiled")), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_default_run_keeps_the_word_of_the_readme(tmp_path):
    done = train_py("trainer.device=cpu", "trainer.progress=false", f"output_dir={tmp_path}")
    found = summary_of(tmp_path)
    assert found["last_accuracy"] > 40 and found["average_accuracy"] > 55
    assert f"Report: {tmp_path}/report/report.html" in done.stdout


# ---- several processes ---------------------------------------------------------------------------------------------------------------


def test_a_stop_is_handed_on_to_spawned_processes(monkeypatch):
    told = []
    monkeypatch.setattr("multiprocessing.active_children", lambda: [SimpleNamespace(terminate=lambda: told.append("terminate"))])
    with _stop_signals_handed_on():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # of a terminal, which sends it to them too, or to this process alone
        assert told == ["terminate", "terminate"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted), _stop_signals_handed_on():
        signal.raise_signal(signal.SIGTERM)
        raise ProcessExitedException("terminated before it listened", 0, 1, -15)
    with pytest.raises(ProcessExitedException, match="out of memory"), _stop_signals_handed_on():
        raise ProcessExitedException("out of memory", 0, 1, -9)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_continues(tmp_path):
    arguments = [
        "method=linear_probe", "dataset.num_tasks=2", "dataset.max_train_per_class=20", "dataset.max_test_per_class=5", "trainer.epochs=30",
        "trainer.device=cpu", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "trainer.num_devices=2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}) as process:
        while process.poll() is None and not list(tmp_path.glob("run/checkpoints/0*.json")):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "Stopped; everything so far is saved" in said
    assert train_py(*arguments).returncode == 0
    assert num_rows(tmp_path / "run") == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dataset": {"root": "elsewhere"}, "backbone": {"checkpoint": "elsewhere"}, "trainer": {"num_workers": 9}}, None),
        ({"seed": 1}, "seed"),
        ({"seed": 1, "trainer": {"epochs": 3}}, "seed, trainer.epochs"),
        ({"weights": "others"}, "weights"),
        ({"images": ["others", "others", "others"]}, "images"),
    ],
)
def test_processes_that_found_something_else_do_not_begin(change, named, tmp_path, monkeypatch):
    """`change` is what another process has beside what this one has."""
    monkeypatch.setattr("inflora.run.gather_objects", lambda own: [own, OmegaConf.to_container(OmegaConf.merge(own, change))])
    if named is None:
        run_toy(tmp_path / "run")
        return
    with pytest.raises(ValueError, match=f"the processes of this run differ in {named}; all machines need the same command, weights"):
        run_toy(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def launched(by: str, rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the second half of a run on two machines of one process each, as a launcher starts it."""
    if by == "torchrun":
        nodes = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        return [sys.executable, "-m", "torch.distributed.run", *nodes, str(ROOT / "train.py")], {}
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_JOB_NAME": "run", "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [sys.executable, str(ROOT / "train.py")], slurm


def on_two_machines(by: str, *halves: tuple[Path, list[str]], code: int = 0) -> list[tuple[str, str]]:
    """Runs both halves, given the folder each is in and its arguments, to the end; what each said on stdout and stderr."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = []
    for rank, (cwd, arguments) in enumerate(halves):
        command, environment = launched(by, rank, port)
        options: Any = {"cwd": cwd, "env": os.environ | environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*command, *arguments], **options))
        time.sleep(1.5)  # so that the times in the names of two default folders differ
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [code, code], said[0][1] + said[1][1]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_two_machines(by, tmp_path):
    """Played by two processes here. The folder is not named: they must agree on one."""
    arguments = ["debug=default", "method=inflora", "trainer.device=cpu", "trainer.progress=false", "trainer.num_devices=2"]
    said = on_two_machines(by, (tmp_path, arguments), (tmp_path, arguments))
    (folder,) = tmp_path.glob("outputs/*/*/*/*")
    assert num_rows(folder) == 5
    assert "task 4: accuracy" in said[0][1] and "task 4: accuracy" not in said[1][1] and "Report:" not in said[1][0]

    (other := tmp_path / "other machine").mkdir()  # again: it is finished, which only the first may know
    said = on_two_machines(by, (tmp_path, [*arguments, f"output_dir={folder}"]), (other, [*arguments, "output_dir=not_here"]))
    assert "This run is finished" in said[0][0] and "This run is finished" not in said[1][0]

    said = on_two_machines(by, (tmp_path, [*arguments, "output_dir=new"]), (other, [*arguments, "output_dir=new", "seed=1"]), code=1)
    assert "error: the processes of this run differ in seed" in said[0][1]


@pytest.mark.slow
def test_processes_of_a_launcher_say_a_fault_once(tmp_path):
    nodes = ["--nproc-per-node=2", "--master-port=0", str(ROOT / "train.py")]
    arguments = ["dataset=imagefolder", "dataset.root=/nowhere", "trainer.device=cpu", "trainer.num_devices=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *nodes, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("dataset.root=/nowhere does not exist") == 1


# ---- faults ------------------------------------------------------------------------------------------------------------------------


def test_faults_in_the_configuration_are_reported_together(tmp_path):
    with pytest.raises(ConfigurationError) as error:
        run_toy(tmp_path / "run", "trainer.device=gpu", "trainer.epochs=0", "resume=always", "seed=-1")
    assert str(error.value).splitlines() == [
        "resume=always is not known; choose one of auto, never",
        "trainer.device=gpu is not known; choose one of auto, cpu, cuda, mps",
        "trainer.epochs=0 is too small; choose 1 or more",
        "seed=-1 is too small; choose 0 or more",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.device=cuda, but torch finds no such device on this machine; choose auto or cpu"):
        run_toy(tmp_path, "trainer.device=cuda")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method.rank=33"], "method.rank=33 exceeds the layer's 32 inputs; choose 1..32"),
        (["dataset.num_tasks=7"], r"dataset.num_tasks=7 does not fit 6 classes; choose 1..6"),
        (["dataset.task_sizes=[2,2]"], r"dataset.task_sizes=\[2, 2\] adds up to 4; give positive numbers that add up to the 6 classes"),
        (["dataset.transform=blur"], "blur"),
        (["+scheduler.milestones=[3]"], "scheduler.milestones is no setting of"),
        (["+optimizer.momentum=0.9"], "optimizer.momentum is no setting of"),
        (["backbone.name=vit_toy"], "backbone.name=vit_toy does not say which weights; choose one of vit_toy.test"),
    ],
)
def test_a_fault_found_while_building_leaves_the_folder_usable(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_toy(tmp_path, *overrides)
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    assert num_rows(tmp_path) == 3


def test_a_method_is_checked_before_any_image_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"method.rank=33 exceeds"):
        run_toy(tmp_path, "method.rank=33", "dataset=imagefolder", "dataset._target_=inflora.data.datasets.imagefolder")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"^output_dir=.*file/run cannot be written: "):
        run_toy(tmp_path / "file" / "run")


def test_other_files_that_fail_are_not_blamed_on_the_folder(tmp_path, monkeypatch):
    def build(*_: Any) -> None:
        raise OSError("the disk of the image cache is full")

    monkeypatch.setattr("inflora.run.build", build)
    with pytest.raises(OSError, match=r"^the disk of the image cache is full$"):
        run_toy(tmp_path)


def test_torchrun_and_the_configuration_must_agree_on_the_processes(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"trainer.num_devices=1, but torchrun started 2 processes; set trainer.num_devices=2"):
        run_toy(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_meet_where_their_launcher_says(monkeypatch):
    """And where there is none, Fabric must not ask the Slurm job that the run is in."""
    trainer = {"num_devices": 2, "device": "cpu", "precision": "32"}
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    assert type(make_fabric(trainer).strategy.cluster_environment) is LightningEnvironment
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert type(make_fabric(trainer).strategy.cluster_environment) is TorchElasticEnvironment


def test_tasks_of_slurm(tmp_path, monkeypatch):
    """A batch script of many tasks is one process; the steps of srun are many, and have to say how they are spread."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    assert started_by_launcher(4) is None
    for name, value in {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert started_by_launcher(1) is None, "runs of their own"
    with pytest.raises(ValueError, match="add --ntasks-per-node=NUMBER"):
        started_by_launcher(4)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert started_by_launcher(4) == ("srun", 4, 2, 3)
    with pytest.raises(ValueError, match=r"trainer.num_devices=2, but srun started 4 processes; set trainer.num_devices=4"):
        run_toy(tmp_path / "run", "trainer.num_devices=2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes .* exceed the 1 CUDA devices .*srun --gpus-per-node, not --gpus-per-task"):
        run_toy(tmp_path / "run", "trainer.num_devices=4", "trainer.device=cuda")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 1 of task 1, epoch 1; start again, in another output_dir, with lower"):
        run_toy(tmp_path, *DIVERGING, "+method.task=1", "+method.step=3")
    assert num_rows(tmp_path) == 1
    last = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert last is not None
    assert {key: last["position"][key] for key in ("stage", "epoch", "step")} == {"stage": 1, "epoch": 1, "step": 0}
    assert all(value.isfinite().all() for value in last["method"]["tensors"].values())
    assert not (tmp_path / "summary.json").exists()


def test_a_last_step_that_ruins_the_weights_is_not_saved(tmp_path):
    """The loss of that step is still finite: it comes before the update."""
    one_step = ["method=linear_probe", "trainer.epochs=1", "trainer.batch_size=64"]
    overflow = ["optimizer=sgd", "optimizer.lr=1e38", "optimizer.weight_decay=1e10"]
    with pytest.raises(RuntimeError, match=r"a weight is no longer finite after task 0, epoch 0; start again"):
        run_toy(tmp_path, *one_step, *overflow)
    assert CheckpointFolder(tmp_path / "checkpoints").latest() is None


def test_a_rate_that_is_far_too_high_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at step \d of task 0, epoch 0; start again"):
        run_toy(tmp_path, "method=sequential_full", "optimizer=sgd", "optimizer.lr=1e30")


def test_a_spawned_process_returns_no_summary(tmp_path, monkeypatch):
    """It would go through a pipe that nobody reads before the process has ended."""
    fabric: Any = SimpleNamespace(broadcast=lambda own: own, is_global_zero=False, world_size=2)
    for found in ({"last_accuracy": 1.0}, ValueError("a fault")):
        monkeypatch.setattr("inflora.run._process", lambda *_, found=found: found)
        assert _spawned(fabric, {"output_dir": str(tmp_path)}, Origin({})) is (found if isinstance(found, ValueError) else None)


# ---- damaged folders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"method: [", b"just a sentence", b"\xff\xfe"])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    for use in (run_toy, evaluate_run):
        with pytest.raises(ValueError, match=r"config.yaml cannot be read as the configuration of a run; restore it from a copy, or"):
            use(tmp_path)


def test_a_run_whose_beginning_is_lost_does_not_go_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    (tmp_path / "copy" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl no longer says what its run began with; restore it from a copy, or"):
        run_toy(tmp_path / "copy")


def test_a_damaged_summary_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"summary.json is damaged \(.*\); remove it, and the same command writes it again"):
        run_toy(tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    run_toy(tmp_path / "copy")
    assert results(tmp_path / "copy") == results(finished)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SystemExit(1)])
def test_a_terminal_that_has_gone_ends_no_run(error, tmp_path, monkeypatch):
    """rich ends the process where the reader of a pipe has left."""

    def gone(*_: Any, **__: Any) -> None:
        if not progress.console.quiet:
            raise error

    monkeypatch.setattr(progress.console, "print", gone)
    try:
        run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    finally:
        progress.console.quiet = False
    assert num_rows(tmp_path) == 3


def test_the_next_run_of_a_process_chooses_its_own_port(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    launch = Fabric.launch
    monkeypatch.setattr(Fabric, "launch", lambda self, *args: os.environ.setdefault("MASTER_PORT", "12345") and launch(self, *args))
    run_toy(tmp_path, "method=linear_probe", "trainer.epochs=1")
    assert "MASTER_PORT" not in os.environ
