"""What the trackers write is read back with each format's own reader, also after a resume."""

import builtins
import json
import logging
import resource
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from inflora.checkpoint import CheckpointError
from inflora.trackers import JsonlTracker, TensorBoardTracker, Tracker, Trackers, WandbTracker, numbers, read_matrix, to_plain, write_matrix

CONF = Path(__file__).parents[1] / "conf" / "tracker"


def read_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ---- plain values ----------------------------------------------------------------------------------------------------------------


def test_to_plain():
    value = {
        "nan": float("nan"),
        "array": np.array([[1.0, np.inf]]),
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "tensor": torch.tensor([1, 2]),
        "path": Path("a/b"),
        "tuple": (1, None, True),
        3: "key",
    }
    plain = to_plain(value)
    assert plain == {
        "nan": None,
        "array": [[1.0, None]],
        "scalar": 0.5,
        "count": 3,
        "tensor": [1, 2],
        "path": "a/b",
        "tuple": [1, None, True],
        "3": "key",
    }
    assert type(plain["count"]) is int
    with pytest.raises(TypeError, match="a set has no form in JSON"):
        to_plain({"classes": {1}})


def test_numbers_are_flattened_and_the_rest_is_left():
    values = {"accuracy": 81.5, "wall": {"train": 2}, "curve": [1.0], "name": "x", "null": None, "flag": True}
    assert dict(numbers(values, "task")) == {"task/accuracy": 81.5, "task/wall/train": 2}


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------------------


def test_one_strict_line_per_event_at_once_on_disk(tmp_path: Path):
    before = time.time()
    trackers = Trackers([JsonlTracker(folder=tmp_path / "run")])
    trackers.log("epoch", {"loss": float("nan"), "text": "line\nbreak \u2028 ü"})
    trackers.log("task", {"accuracy": np.array([0.5, np.nan])})
    first, second = read_lines(tmp_path / "run")  # before close
    assert before - 1 <= first.pop("time") <= second.pop("time") <= time.time() + 1
    assert first == {"event": "epoch", "loss": None, "text": "line\nbreak \u2028 ü"}
    assert second == {"event": "task", "accuracy": [0.5, None]}
    assert trackers.position() == 2
    trackers.close()


def test_resume_drops_the_lines_after_the_checkpoint(tmp_path: Path):
    trackers = Trackers([JsonlTracker(folder=tmp_path)])
    for epoch in range(3):
        trackers.log("epoch", {"epoch": epoch})
    position = trackers.position()
    for epoch in range(3, 5):
        trackers.log("epoch", {"epoch": epoch})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "epoch", "ep')  # killed while writing

    resumed = Trackers([JsonlTracker(folder=tmp_path)])
    assert [line["epoch"] for line in read_lines(tmp_path)] == [0, 1, 2, 3, 4]
    resumed.rewind(position)
    resumed.log("epoch", {"epoch": 3, "again": True})
    assert [line["epoch"] for line in read_lines(tmp_path)] == [0, 1, 2, 3]
    assert read_lines(tmp_path)[-1]["again"]
    assert resumed.position() == 4

    fresh = Trackers([JsonlTracker(folder=tmp_path)])
    fresh.rewind(0)
    assert read_lines(tmp_path) == []


def test_lost_lines_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tracker = JsonlTracker(folder=tmp_path)
    tracker.log("epoch", {}, 0)
    with caplog.at_level(logging.WARNING):
        tracker.rewind(3)
    assert len(read_lines(tmp_path)) == 1
    assert "metrics.jsonl has 1 lines where the checkpoint knows 3; the missing ones are lost" in caplog.text


def test_a_line_that_does_not_fit_leaves_no_half(tmp_path: Path):
    tracker = JsonlTracker(folder=tmp_path)
    tracker.log("epoch", {"epoch": 0}, 0)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (tracker.path.stat().st_size + 10, old[1]))  # the system takes ten more bytes, then refuses
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: File too large; everything saved before is intact"):
            tracker.log("epoch", {"epoch": 1}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [line["epoch"] for line in read_lines(tmp_path)] == [0]
    tracker.log("epoch", {"epoch": 1}, 1)
    assert [line["epoch"] for line in read_lines(tmp_path)] == [0, 1]


def test_no_trackers_still_count(tmp_path: Path):
    trackers = Trackers([])
    trackers.rewind(3)
    trackers.log("epoch", {"loss": 1.0})
    assert trackers.position() == 4
    trackers.close()


# ---- accuracy matrices -----------------------------------------------------------------------------------------------------------


def test_matrix_format(tmp_path: Path):
    nan = np.nan
    write_matrix(tmp_path / "m.csv", [[1.0, nan, nan], [0.5, 1 / 3, nan], [nan, nan, nan]])
    assert (tmp_path / "m.csv").read_text() == "task_0,task_1,task_2\n100.000000,,\n50.000000,33.333333,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    "matrix",
    [
        np.full((3, 3), np.nan),
        np.array([[0.25]]),
        np.full((1, 1), np.nan),
        np.array([[np.nan, np.nan], [0.125, 0.75]]),  # joint: only the last row is measured
        np.tril(np.random.default_rng(0).random((10, 10))) + np.triu(np.full((10, 10), np.nan), 1),
    ],
)
def test_matrix_round_trip(tmp_path: Path, matrix: np.ndarray):
    write_matrix(tmp_path / "m.csv", matrix)
    np.testing.assert_allclose(read_matrix(tmp_path / "m.csv"), matrix, rtol=0, atol=5.1e-9)


@pytest.mark.parametrize(("text", "line"), [("task_0,task_1\n1\n", 2), ("task_0\n1\n2\n", 3), ("task_0,task_1\n1,\n1,2,3\n", 3)])
def test_a_malformed_matrix_is_named(tmp_path: Path, text: str, line: int):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"m\.csv is no accuracy matrix: line {line} does not fit the \d tasks of its header"):
        read_matrix(tmp_path / "m.csv")


# ---- configuration ---------------------------------------------------------------------------------------------------------------


def build(name: str, folder: Path, **changes: Any) -> Tracker:
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes), folder=folder)


def test_every_choice_has_a_description_and_the_default_does_nothing(tmp_path: Path):
    for path in CONF.glob("*.yaml"):
        assert path.read_text().startswith("# ")
    trackers = Trackers([build("jsonl", tmp_path)])
    trackers.rewind(0)
    trackers.log("epoch", {"loss": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_not_installed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    original = builtins.__import__

    def without_package(module: str, *args: Any) -> Any:
        if name in module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(module, *args)

    monkeypatch.setattr(builtins, "__import__", without_package)
    arguments = {"project": "p", "entity": None, "group": None, "mode": None, "tags": []} if name == "wandb" else {}
    with pytest.raises(ValueError, match=f"tracker={name} needs the package {name}, which is not installed: pip install {name}"):
        {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}[name](folder=tmp_path, **arguments)


# ---- wandb, for real and offline -------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb without an account, a network, or a trace outside `tmp_path`; no background process stays."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # wandb's own, at import
        import wandb
    yield
    wandb.teardown()


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: protocol buffers in a log of 32 KiB blocks (LevelDB's log format after a header of 7 bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - generated by star import

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(content):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(folder: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """The run records and the logged rows of all offline runs of a folder, in the order they were started."""
    import wandb

    wandb.teardown()  # waits for its background process, which may still be writing
    runs, rows = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in read_wandb(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
    return runs, rows


def configuration(folder: Path) -> dict[str, Any]:
    values = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for record in read_wandb(path):
            values |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    return values


@pytest.mark.usefixtures("wandb_alone")
@pytest.mark.parametrize("failed", [False, True])
def test_wandb_is_told_how_a_run_has_ended(failed: bool, tmp_path: Path):
    tracker = build("wandb", tmp_path, mode="offline", project="p", entity=None, group=None, tags=[])
    tracker.close(failed=failed)
    import wandb

    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [record.exit.exit_code for record in read_wandb(file) if record.HasField("exit")] == [int(failed)]


@pytest.mark.usefixtures("wandb_alone")
def test_wandb_offline_holds_what_was_logged_and_a_resume_is_the_same_run(tmp_path: Path):
    changes = {"mode": "offline", "project": "continual", "entity": "group", "group": "seeds", "tags": ["a", "b"]}
    trackers = Trackers([JsonlTracker(folder=tmp_path), build("wandb", tmp_path, **changes)])
    trackers.rewind(0)
    trackers.log("run", {"seed": 3, "method": {"rank": 10}})
    trackers.log("epoch", {"loss": 0.5, "lr": float("nan")})
    trackers.log("task", {"last_accuracy": 81.25, "wall": {"train": 2.0}, "curve": [1, 2]})
    trackers.close()

    runs, rows = history(tmp_path)
    assert {(run.project, run.entity, run.run_group, tuple(run.tags)) for run in runs} == {("continual", "group", "seeds", ("a", "b"))}
    rows = [{key: value for key, value in row.items() if not key.startswith("_") or key == "_step"} for row in rows]
    assert rows == [{"epoch/loss": 0.5, "_step": 1}, {"task/last_accuracy": 81.25, "task/wall/train": 2.0, "_step": 2}]
    assert configuration(tmp_path) == {"seed": 3, "method": {"rank": 10}}

    resumed = Trackers([JsonlTracker(folder=tmp_path), build("wandb", tmp_path, **changes)])
    resumed.rewind(2)
    resumed.log("task", {"last_accuracy": 81.25})
    resumed.close()
    runs, rows = history(tmp_path)
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id").read_text().strip()}
    assert rows[-1]["_step"] == 2


@pytest.mark.usefixtures("wandb_alone")
def test_wandb_that_cannot_start_is_one_sentence(tmp_path: Path):
    arguments = {"folder": tmp_path, "project": "p", "entity": None, "group": None, "tags": []}
    with pytest.raises(ValueError, match=r"tracker=wandb cannot start: .*; log in with `wandb login`, or set tracker\.mode=offline"):
        WandbTracker(mode="online", **arguments)
    with pytest.raises(ValueError, match=r"tracker\.mode=ofline is not known; choose online, offline, disabled or null"):
        WandbTracker(mode="ofline", **arguments)


# ---- TensorBoard, for real -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_holds_what_was_logged_and_a_resume_replaces_what_followed(tmp_path: Path):
    trackers = Trackers([JsonlTracker(folder=tmp_path), build("tensorboard", tmp_path)])
    trackers.rewind(0)
    trackers.log("run", {"seed": 3})
    for epoch in range(4):
        trackers.log("epoch", {"loss": 1.0 / (1 + epoch), "text": "x"})
    # Killed here: nothing is closed.
    resumed = Trackers([JsonlTracker(folder=tmp_path), build("tensorboard", tmp_path)])
    resumed.rewind(3)
    resumed.log("epoch", {"loss": 7.0})
    resumed.log("task", {"last_accuracy": 81.25})
    resumed.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["epoch/loss", "task/last_accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("epoch/loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert [(event.step, event.value) for event in events.Scalars("task/last_accuracy")] == [(4, 81.25)]
    (text,) = events.Tensors("run/text_summary")
    assert b'"seed": 3' in text.tensor_proto.string_val[0]
    trackers.close()
