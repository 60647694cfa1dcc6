"""Checkpoints: bit-exact round trips, the shared base, and what a kill, a full disk or a damaged file leave behind."""

import errno
import json
import logging
import multiprocessing
import os
import random
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from far_device import FAR, far_device
from helpers import fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from inflora import checkpoint
from inflora.checkpoint import CheckpointError, CheckpointFolder, load, save, sha256_file


def assert_same(a, b) -> None:
    """Same types, same bits."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(name) for name in a] == [type(name) for name in b]
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b)
        assert repr(a) == repr(b)  # NaN equals itself, 0.0 differs from -0.0


def awkward_state() -> dict:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "tensors": {
            "plain": base,
            "alias": base,
            "overlapping view": base[1:],
            "transposed": base.T,
            "strided": base[:, ::2],
            "0-d": torch.tensor(2.5),
            "0-d bool": torch.tensor(True),
            "empty": torch.zeros(0, 7),
            "empty float64": torch.zeros(5, 0, dtype=torch.float64),
            "bfloat16": torch.randn(4, 3).bfloat16(),
            "float16": torch.randn(5).half(),
            "float64": torch.randn(5, dtype=torch.float64) / 3,
            "int64": torch.tensor([-(2**63), 2**63 - 1]),
            "uint8": torch.arange(256, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "not finite": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
            "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0, 7]}]},
        "values": [None, True, 0, -3, 2**70, 0.1, 1e-320, float("nan"), float("-inf"), -0.0, "ü\ud800\n", "", (), [], {}, ((1,), [2])],
        1: "int key",
        "1": torch.ones(1),
        "__metadata__": torch.ones(3),
    }


def test_any_nest_round_trips_bit_exactly(tmp_path: Path):
    state = awkward_state()
    save(tmp_path / "a.safetensors", state)
    assert_same(state, load(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("state", [None, 3, "text", [], {}, (torch.ones(2), 1)])
def test_a_nest_need_not_be_a_dict(tmp_path: Path, state):
    save(tmp_path / "a.safetensors", state)
    assert_same(state, load(tmp_path / "a.safetensors"))


nests = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(nests)
def test_structures_survive_json(nest):
    structure, tensors = checkpoint._flatten(nest)
    text = json.dumps(structure, allow_nan=False)
    assert_same(nest, checkpoint._decode(json.loads(text), tensors))


def test_keys_that_read_alike_stay_apart(tmp_path: Path):
    state = {1: torch.ones(1), "1": torch.zeros(1), "a/b": torch.ones(2), "a": {"b": torch.zeros(2)}, "__metadata__": torch.ones(3)}
    save(tmp_path / "a.safetensors", state)
    assert_same(state, load(tmp_path / "a.safetensors"))


def test_a_real_optimizer_continues_identically(tmp_path: Path):
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}], lr=0.01)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer)
    save(tmp_path / "a.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)

    resumed, resumed_optimizer = make()
    state = load(tmp_path / "a.safetensors")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    step(resumed, resumed_optimizer)
    assert_same(dict(model.state_dict()), dict(resumed.state_dict()))
    assert_same(optimizer.state_dict(), resumed_optimizer.state_dict())


def test_mappings_become_dicts_and_unknown_types_are_named(tmp_path: Path):
    save(tmp_path / "a.safetensors", OrderedDict(b=1, a=2))
    assert_same({"b": 1, "a": 2}, load(tmp_path / "a.safetensors"))
    with pytest.raises(TypeError, match=r"state entry 'method/seen' is a set; .* convert it"):
        save(tmp_path / "b.safetensors", {"method": {"seen": {1, 2}}})
    with pytest.raises(TypeError, match="state entry 'by_pair' is a dict; a checkpoint holds dicts with str or int keys"):
        save(tmp_path / "b.safetensors", {"by_pair": {(0, 1): 2}})
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path):
    save(tmp_path / "a.safetensors", {"w": torch.arange(5.0)})
    state = load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"gone")
    state["w"] += 1
    assert state["w"].tolist() == [1, 2, 3, 4, 5]


def test_files_are_plain_safetensors_and_json_with_the_folder_permissions(tmp_path: Path):
    tmp_path.chmod(0o755)
    save(tmp_path / "a.safetensors", {"method": {"w": torch.arange(3)}}, tag="x")
    assert load_file(tmp_path / "a.safetensors")["method/w"].tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "a.json").read_text()) == {"tag": "x", "sha256": sha256_file(tmp_path / "a.safetensors")}
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o644"}


# ---- the base --------------------------------------------------------------------------------------------------------------------


def big_state(num_same: int = 50, changed: float = 0.0) -> dict:
    generator = torch.Generator().manual_seed(0)
    frozen = {f"block_{i}": torch.randn(64, 64, generator=generator) for i in range(num_same)}
    return {"method": {**frozen, "lora_B": torch.full((3, 4), changed)}, "progress": {"epoch": changed}}


def test_what_equals_the_base_is_stored_once(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.save_base({"method": big_state()["method"]})
    folder.save(big_state(changed=1.0), "epoch_1")
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert sizes["base.safetensors"] > 50 * 64 * 64 * 4
    assert sizes["000001-epoch_1.safetensors"] < 20_000
    assert_same(big_state(changed=1.0), folder.latest())


def test_only_equal_bits_count_as_equal(tmp_path: Path):
    nan = torch.tensor([float("nan")])
    base = {"zero": torch.zeros(2), "nan": nan, "int": torch.ones(2), "shape": torch.ones(4), "same": torch.ones(())}
    new = {
        "zero": -torch.zeros(2),
        "nan": torch.tensor([nan]),
        "int": torch.ones(2).int(),
        "shape": torch.ones(2, 2),
        "same": torch.ones(()),
    }
    save(tmp_path / "base.safetensors", base)
    save(tmp_path / "new.safetensors", new, bases=[tmp_path / "base.safetensors"])
    assert set(load_file(tmp_path / "new.safetensors")) == {"zero", "int", "shape"}
    assert_same(new, load(tmp_path / "new.safetensors"))


CHANGES = {
    "nothing": lambda x: x,
    "one bit": lambda x: (x.view(-1).view(torch.int32) ^ torch.tensor([1] + 11 * [0], dtype=torch.int32)).view(torch.float32).view(3, 4),
    "the sign of a zero": lambda x: torch.where(x == 0, -x, x),
    "the order": lambda x: x.flip(0),
    "two elements by the same amount": lambda x: x + torch.tensor([0.5, -0.5, 0, 0]),
    "the shape": lambda x: x.view(4, 3),
    "the type": lambda x: x.view(torch.int32),
}


@pytest.mark.parametrize("at_once", [4, 2**22])
@pytest.mark.parametrize("change", CHANGES)
def test_what_stays_on_a_device_is_compared_there(change, at_once, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SCRAMBLED_AT_ONCE", at_once)
    here = {"weight": torch.arange(12.0).view(3, 4), "half": torch.full((5,), torch.nan, dtype=torch.half), "number": torch.tensor(3)}
    folder = CheckpointFolder(tmp_path)
    with far_device() as notes:
        state = {name: tensor.to(FAR) for name, tensor in here.items()}
        folder.save_base(state)
        folder.save(state, "first")
        notes.waits.clear()
        folder.save(state, "second")
        assert len(notes.waits) == 1  # for the marks of all
        state["weight"] = CHANGES[change](here["weight"]).to(FAR)
        folder.save(state, "third")
    assert set(load_file(folder.path / "000002-second.safetensors")) == set()
    assert set(load_file(folder.path / "000003-third.safetensors")) == (set() if change == "nothing" else {"weight"})
    assert_same(folder.latest(), here | {"weight": CHANGES[change](here["weight"])})


@pytest.mark.parametrize("device", ["cpu", FAR])
def test_what_a_task_does_not_change_is_stored_at_its_beginning(device, tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    merged, branch = torch.ones(3), torch.zeros(2)
    with far_device() as notes:

        def there(**tensors: Tensor) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        folder.save_base(there(merged=torch.zeros(3), frozen=torch.arange(4.0)))
        for step in range(2):
            begun = there(merged=merged + step, frozen=torch.arange(4.0), branch=branch)
            folder.save(begun, f"task{step}", boundary=True)
            for epoch in (1, 2):
                notes.waits.clear()
                folder.save(begun | there(branch=branch + epoch), f"epoch{epoch}")
                copies = [note for note in notes.waits if "to the host" in note]
                assert len(copies) == (0 if device == "cpu" else 2)  # the marks, and the branch
    stored = {path.stem.partition("-")[2]: set(load_file(path)) for path in tmp_path.glob("0*.safetensors")}
    assert stored == {"task1": {"merged", "branch"}, "epoch1": {"branch"}, "epoch2": {"branch"}}
    expected = {"merged": merged + 1, "frozen": torch.arange(4.0), "branch": branch + 2}
    assert_same(folder.latest(), expected)
    again = CheckpointFolder(tmp_path)  # which knows no marks
    for epoch, num_copies in ((3, 6), (4, 2)):  # first every tensor for every file that has it, the marks, the branch
        state = expected | {"branch": branch + epoch}
        with far_device() as notes:
            begun = there(**state)
            notes.waits.clear()
            again.save(begun, f"epoch{epoch}")
            assert len([note for note in notes.waits if "to the host" in note]) == (0 if device == "cpu" else num_copies)
        assert set(load_file(next(tmp_path.glob(f"*-epoch{epoch}.safetensors")))) == {"branch"}
        assert_same(again.latest(), state)
    flip_byte(next(tmp_path.glob("*-task1.safetensors")))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(.*-task1\.safetensors is damaged"):
        CheckpointFolder(tmp_path).latest()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"base\.safetensors is missing"),
        (lambda path: flip_byte(path), r"base\.safetensors is damaged: its sha256 is not the one in base\.json"),
        (
            lambda path: save(path, {"w": torch.ones(3)}),
            r"base\.safetensors is not the file that .*000002-b\..* was saved against",
        ),
        (lambda path: path.with_suffix(".json").write_text("{"), r"base\.json is missing or damaged"),
    ],
)
def test_a_lost_base_is_one_sentence(tmp_path: Path, damage, message: str):
    folder = CheckpointFolder(tmp_path)
    folder.save_base({"w": torch.zeros(3)})
    folder.save({"w": torch.zeros(3)}, "a")
    folder.save({"w": torch.zeros(3)}, "b")
    damage(folder.base)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "000002-b.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(.*base\..*\); restore the folder from a copy"):
        folder.latest()


def test_saving_against_a_lost_base_is_one_sentence(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.save_base({"w": torch.zeros(3)})
    folder.base.unlink()
    with pytest.raises(CheckpointError, match=r"base\.safetensors is missing or damaged"):
        folder.save({"w": torch.zeros(3)}, "a")
    save(folder.base, {"w": torch.zeros(3)})
    folder.base.with_suffix(".json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"base\.json is missing or damaged"):
        folder.save({"w": torch.zeros(3)}, "a")
    assert names(folder) == pairs("base")


# ---- the folder ------------------------------------------------------------------------------------------------------------------


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


def pairs(*stems: str) -> list[str]:
    return sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "safetensors"))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_no_checkpoint_is_none(tmp_path: Path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.latest() is None
    assert folder.latest_boundary() is None
    assert not folder.path.exists()


def test_the_last_two_and_what_they_follow_stay(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    for epoch in range(6):
        folder.save({"epoch": epoch}, f"epoch_{epoch}", boundary=epoch in (0, 2))
        assert folder.latest() == {"epoch": epoch}
    assert names(folder) == pairs("000003-epoch_2", "000005-epoch_4", "000006-epoch_5")
    assert folder.latest_boundary() == {"epoch": 2}
    folder.save({"epoch": 6}, "task_1", boundary=True)
    assert names(folder) == pairs("000003-epoch_2", "000006-epoch_5", "000007-task_1")
    assert folder.latest_boundary() == {"epoch": 6}
    folder.save({"epoch": 7}, "epoch_7")
    assert names(folder) == pairs("000007-task_1", "000008-epoch_7")


def test_a_damaged_boundary_leaves_the_one_before(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    for name, boundary in (("task0", True), ("task1_epoch0", False), ("task1_epoch1", False), ("task1", True)):
        folder.save(name, name, boundary=boundary)
    last = max(tmp_path.glob("*-task1.safetensors"))
    last.write_bytes(b"damaged")
    again = CheckpointFolder(tmp_path)
    assert again.latest() == "task1_epoch1"
    assert again.latest_boundary() == "task0", "else nothing says where task 1 began"


def test_numbers_go_on_in_a_new_process(tmp_path: Path):
    CheckpointFolder(tmp_path).save({}, "a")
    CheckpointFolder(tmp_path).save({}, "b")
    assert names(CheckpointFolder(tmp_path)) == pairs("000001-a", "000002-b")


def test_leftovers_of_a_kill_go_with_the_next_save_and_nothing_else_does(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.save_base({})
    for name in ("000009-x.safetensors", "000009-x.json.tmp", "base.safetensors.tmp", ".tmpAbc123"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert folder.latest() is None
    folder.save({}, "a")
    assert names(folder) == sorted([*pairs("000001-a", "base"), "notes.txt"])


@pytest.mark.parametrize("damage", ["tensors", "record", "record_type", "no_tensors"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str):
    folder = CheckpointFolder(tmp_path)
    for epoch in range(2):
        folder.save({"epoch": epoch}, f"epoch_{epoch}")
    newest = tmp_path / "000002-epoch_1.safetensors"
    if damage == "tensors":
        flip_byte(newest)
    elif damage == "no_tensors":
        newest.unlink()
    else:
        newest.with_suffix(".json").write_text("{" if damage == "record" else "3")

    resumed = CheckpointFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resumed.latest() == {"epoch": 0}
    (line,) = caplog.messages
    assert line.startswith("checkpoint 000002-epoch_1.safetensors cannot be used: ")
    resumed.save({"epoch": 1}, "epoch_1")  # the damaged one must not count among the last two
    assert names(resumed) == pairs("000001-epoch_0", "000003-epoch_1")


def test_when_none_can_be_read_the_run_does_not_start_over(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.save({"epoch": 0}, "a")
    flip_byte(tmp_path / "000001-a.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(.*000001-a\..* is damaged: .*remove it to start"):
        folder.latest()


# ---- failures while writing ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


CALLS = [("replace", nth) for nth in range(2)] + [("fsync", nth) for nth in range(4)]


def fail_at(monkeypatch: pytest.MonkeyPatch, function: str, nth: int, error: BaseException, before: bool = True) -> None:
    """Raise in the `nth` call of os.`function`, before or after it has done its work."""
    original = getattr(os, function)
    count = iter(range(1000))

    def wrapped(*args):
        fails = next(count) == nth
        if fails and before:
            raise error
        original(*args)
        if fails:
            raise error

    monkeypatch.setattr(os, function, wrapped)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("function", "nth"), CALLS)
def test_a_stop_at_any_point_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, nth: int, before: bool
):
    folder = CheckpointFolder(tmp_path)
    folder.save({"w": torch.zeros(3), "epoch": 0}, "a")
    monkeypatch.setattr(CheckpointFolder, "_prune", lambda self: None)  # a kill tidies nothing up
    with monkeypatch.context() as patch:
        fail_at(patch, function, nth, Killed(), before)
        with pytest.raises(Killed):
            folder.save({"w": torch.ones(3), "epoch": 1}, "b")
    monkeypatch.undo()

    resumed = CheckpointFolder(tmp_path)
    is_new = (function, nth) == ("fsync", 3) or (function, nth, before) == ("replace", 1, False)
    assert_same({"w": torch.ones(3), "epoch": 1} if is_new else {"w": torch.zeros(3), "epoch": 0}, resumed.latest())
    resumed.save({"epoch": 2}, "c")
    assert names(resumed) == pairs("000001-a", "000002-c") if not is_new else pairs("000002-b", "000003-c")


@pytest.mark.parametrize(("function", "nth"), CALLS[:-1])  # after the last one the new checkpoint is there
def test_an_io_error_at_any_point_is_one_sentence_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, nth: int
):
    folder = CheckpointFolder(tmp_path)
    folder.save({"epoch": 0}, "a")
    with monkeypatch.context() as patch:
        fail_at(patch, function, nth, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(CheckpointError, match=r"cannot write .*000002-b\..*: No space left on device; everything"):
            folder.save({"epoch": 1}, "b")
    assert names(folder) == pairs("000001-a")
    assert folder.latest() == {"epoch": 0}


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path):
    folder = CheckpointFolder(small_disk)
    folder.save({"w": torch.ones(100_000)}, "a")
    for size in (1_000_000, 200_000, 160_000):  # too large for the disk; for what is left of it; to leave room for the record
        with pytest.raises(
            CheckpointError, match=r"cannot write .*000002-b\.(safetensors|json): No space left on device.*; everything saved before"
        ):
            folder.save({"w": torch.ones(size)}, "b")
        assert names(folder) == pairs("000001-a")
    assert_same({"w": torch.ones(100_000)}, folder.latest())
    folder.save({"w": torch.ones(1000)}, "b")
    assert names(folder) == pairs("000001-a", "000002-b")


def save_forever(path: str, acknowledge) -> None:
    torch.set_num_threads(1)
    folder = CheckpointFolder(Path(path))
    state = folder.latest()
    epoch = 0 if state is None else state["epoch"]
    if state is None:
        folder.save_base({"frozen": torch.arange(50_000.0)})
    while True:
        epoch += 1
        state = {"frozen": torch.arange(50_000.0), "moving": torch.full((20_000,), float(epoch)), "epoch": epoch}
        folder.save(state, f"epoch_{epoch}", boundary=epoch % 5 == 0)
        acknowledge.send(epoch)


def test_sigkill_while_saving_loses_at_most_the_save_in_progress(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inflora.run", "pytest", "hypothesis.strategies"])  # what this file imports takes seconds
    delays = random.Random(0)
    folder = CheckpointFolder(tmp_path)
    last = 0
    for _ in range(12):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(str(tmp_path), sender))
        process.start()
        sender.close()
        assert receiver.poll(60), "the process never saved"
        time.sleep(delays.uniform(0, 0.05))
        process.kill()
        process.join()
        acknowledged = last
        while receiver.poll():
            try:
                acknowledged = receiver.recv()
            except EOFError:
                break
        receiver.close()
        state = folder.latest()
        assert state is not None
        last = state["epoch"]
        assert last in (acknowledged, acknowledged + 1)
        assert_same(torch.full((20_000,), float(last)), state["moving"])
        assert_same(torch.arange(50_000.0), state["frozen"])
    folder.save({}, "end")
    assert len(names(folder)) <= 2 + 2 * 3


# ---- hashes ----------------------------------------------------------------------------------------------------------------------


def test_sha256_of_a_file(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_sees_every_bit_name_type_and_shape():
    reference = {"w": torch.zeros(2, 2), "n": 1}
    assert fingerprint(reference) == fingerprint({"w": torch.zeros(4).reshape(2, 2).T, "n": 1})
    others = [
        {"w": -torch.zeros(2, 2), "n": 1},
        {"v": torch.zeros(2, 2), "n": 1},
        {"w": torch.zeros(4), "n": 1},
        {"w": torch.zeros(2, 2).int(), "n": 1},
        {"w": torch.zeros(2, 2), "n": 2},
    ]
    assert len({fingerprint(state) for state in [reference, *others]}) == 6
