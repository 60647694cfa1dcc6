"""The loop: what is called when, stopping and going on at every point, losses, rates, testing."""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy
from helpers import fingerprint, num_rows, read_events, results, run_toy
from learning import build
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import Precision
from torch import Tensor, nn

from inflora import checkpoint, run, run_folder, trackers, trainer
from inflora.method import Method
from inflora.methods.inflora import InfLoRA
from inflora.methods.linear_probe import LinearProbe
from inflora.trainer import Interrupted, evaluate, trainable_groups

pytestmark = pytest.mark.usefixtures("no_report")

TWO_TASKS = ["dataset.num_tasks=2"]
"""Two tasks of three classes: two epochs of three steps each."""

PROBE = ["method=linear_probe", "dataset.num_tasks=2"]


# ---- the order of calls ------------------------------------------------------------------------------------------------------------


class Told(LinearProbe):
    """Writes down what it is told, in which mode, for which task."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.calls: list[str] = CALLS

    def tell(self, name: str) -> None:
        self.calls.append(f"{name}{self.task.index}{'t' if self.training else 'e'}")

    def begin_task(self, task: Any) -> None:
        self.tell("begin")
        super().begin_task(task)

    def param_groups(self) -> list[dict[str, Any]]:
        self.tell("groups")
        return super().param_groups()

    def begin_epoch(self, epoch: int) -> None:
        self.tell(f"epoch{epoch}:")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.tell(f"loss{len(x)}:")
        return super().loss(x, y)  # type: ignore[return-value]

    def after_step(self) -> None:
        self.tell("step")

    def end_task(self, task: Any) -> None:
        self.tell("end")

    def predict(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.tell("predict")
        return super().predict(x)


CALLS: list[str] = []


def test_what_a_method_is_told(tmp_path):
    CALLS.clear()
    run_toy(tmp_path, *PROBE, "method._target_=test_trainer.Told")
    assert len(CALLS) > 0
    steps = ["loss8:{t}t", "step{t}t", "loss8:{t}t", "step{t}t", "loss2:{t}t", "step{t}t"]
    task = ["begin{t}e", "groups{t}e", "epoch0:{t}t", *steps, "epoch1:{t}t", *steps, "end{t}e"]
    expected = [call.format(t=0) for call in task] + ["predict0e"] + [call.format(t=1) for call in task] + ["predict1e"] * 2
    assert expected == CALLS


def test_a_method_that_trains_nothing_is_not_asked_for_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Frozen, "loss", lambda *_: pytest.fail("nothing trains"))
    assert run_toy(tmp_path, *PROBE, "method._target_=toy.Frozen")["trainable_parameters_per_task"] == [0, 0]


def test_several_losses_a_batch_are_as_many_steps(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(toy.TwoSteps, "after_step", lambda self: steps.append(self.task.index))
    run_toy(tmp_path, *PROBE, "method._target_=toy.TwoSteps", "trainer.epochs=1")
    assert steps == [0] * 6 + [1] * 6


class Stepping(toy.TwoSteps):
    """Holds the trainer to a step between each loss and what comes after the step."""

    def loss(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for loss in super().loss(x, y):
            self.before = self.heads.current.weight.detach().clone()
            yield loss

    def after_step(self) -> None:
        assert not torch.equal(self.before, self.heads.current.weight)
        self.before = self.heads.current.weight.detach().clone()
        CALLS.append("step")


def test_after_a_step_the_weights_have_moved(tmp_path):
    CALLS.clear()
    run_toy(tmp_path, *PROBE, "method._target_=test_trainer.Stepping", "trainer.epochs=1")
    assert CALLS == ["step"] * 12


def test_everything_that_draws_has_a_seed_of_its_own(tmp_path, monkeypatch):
    drawn = []
    original = trainer.seed_everything
    monkeypatch.setattr(trainer, "seed_everything", lambda *keys: drawn.append(keys) or original(*keys))
    run_toy(tmp_path, *PROBE, "seed=3")
    assert drawn == [
        keys
        for task in range(2)
        for keys in [
            (3, "begin", task),
            *(keys for epoch in range(2) for keys in [(3, "fit", task, epoch), *((3, "fit", task, epoch, step) for step in range(3))]),
            (3, "end", task),
        ]
    ]


def test_interference_counts_what_the_beginning_of_a_task_changes(tmp_path, monkeypatch):
    calls = []
    for owner, name in ((trainer.InterferenceProbe, "before"), (LinearProbe, "begin_task")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
    run_toy(tmp_path, *PROBE, "trainer.epochs=1")
    assert calls == ["before", "begin_task"] * 2


@pytest.mark.parametrize("parts", [1, 3])
def test_a_method_knows_which_images_a_batch_holds(parts, tmp_path, monkeypatch):
    seen = []
    original = LinearProbe.loss

    def loss(self: LinearProbe, x: Tensor, y: Tensor) -> Any:
        assert torch.equal(self.task.train_labels[self.sample_ids], y)
        seen.extend(self.sample_ids.tolist())
        return original(self, x, y)

    monkeypatch.setattr(LinearProbe, "loss", loss)
    run_toy(tmp_path, *PROBE, f"trainer.grad_accumulation={parts}")
    epochs = [seen[start : start + 18] for start in range(0, len(seen), 18)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(18))] * 4, "each image once an epoch"
    assert epochs[0] != epochs[1]


def test_a_generator_of_one_loss_is_that_loss(tmp_path, monkeypatch):
    run_toy(tmp_path / "plain", *PROBE)
    original = LinearProbe.loss
    monkeypatch.setattr(LinearProbe, "loss", lambda self, x, y: iter([original(self, x, y)]))
    run_toy(tmp_path / "generator", *PROBE)
    assert results(tmp_path / "generator") == results(tmp_path / "plain")


def test_groups_get_their_rates_and_everything_else_is_frozen():
    method = Method(toy.toy_vit())
    head, other = nn.Linear(2, 3), nn.Linear(2, 2)
    method.extra = nn.ModuleList([head, other])
    method.param_groups = lambda: [  # type: ignore[method-assign]
        {"params": iter(head.parameters()), "role": "head"},
        {"params": [], "role": "branch"},
    ]
    groups = trainable_groups(method, {"branch": 0.1, "head": 0.2})
    assert [(len(group["params"]), group["lr"], group["role"]) for group in groups] == [(2, 0.2, "head")]
    assert {name for name, p in method.named_parameters() if p.requires_grad} == {"extra.0.weight", "extra.0.bias"}


def test_a_compiled_backbone_runs_uncompiled_outside_the_epochs():
    layer = nn.Linear(2, 2)
    model, x, seen = nn.Sequential(layer), torch.ones(1, 2), []
    torch.compiler.reset()
    model.compile(backend="eager")
    with trainer.eagerly(nn.Sequential(layer)):
        compiled = model(x)
    layer.register_forward_pre_hook(lambda *_: seen.append("called"))
    with trainer.eagerly(model):
        torch.testing.assert_close(model(x), compiled)
    assert seen == ["called"], "a compiled graph goes on without the hook"


def test_rates_follow_the_schedule(tmp_path, monkeypatch):
    seen = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        seen.append([(group["role"], group["lr"]) for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run_toy(
        tmp_path, "dataset.num_tasks=1", "trainer.epochs=3", "trainer.batch_size=100", "optimizer=sgd", "optimizer.lr=0.4",
        "optimizer.head_lr=0.2", "scheduler=step", "scheduler.milestones=[1,2]", "scheduler.gamma=0.5",
    )  # fmt: skip
    assert seen == [[("branch", 0.4 * f), ("head", 0.2 * f)] for f in (1.0, 0.5, 0.25)]
    assert [event["lr"] for event in read_events(tmp_path, "epoch")] == [0.4, 0.2, 0.1]


def test_a_group_may_bring_a_rate_of_its_own(tmp_path, monkeypatch):
    rates, original, groups = [], torch.optim.SGD.step, LinearProbe.param_groups

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(LinearProbe, "param_groups", lambda self: [group | {"lr": 0.05} for group in groups(self)])
    run_toy(
        tmp_path, *PROBE, "trainer.epochs=2", "trainer.batch_size=100", "optimizer=sgd", "optimizer.head_lr=0.2", "scheduler=step",
        "scheduler.milestones=[1]", "scheduler.gamma=0.5",
    )  # fmt: skip
    assert rates == [[0.05], [0.025]] * 2


def test_trackers_are_told_how_a_run_has_ended(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(trackers.Tracker, "close", lambda self, *, failed: ends.append((type(self).__name__, failed)))
    run_toy(tmp_path / "good", *PROBE, "trainer.epochs=1")
    with pytest.raises(trainer.TrainingError):
        run_toy(tmp_path / "bad", *PROBE, "trainer.epochs=1", "method._target_=toy.Diverging", "+method.task=0", "+method.step=0")
    assert ends == [("JsonlTracker", False), ("Tracker", False), ("JsonlTracker", True), ("Tracker", True)]


class Casting(toy.TwoSteps):
    """Notes where products are computed in half precision."""

    def note(self, name: str) -> None:
        CASTS.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

    def begin_task(self, task: Any) -> None:
        self.note("begin_task")
        super().begin_task(task)

    def loss(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for loss in super().loss(x, y):
            self.note("loss")
            yield loss

    def end_task(self, task: Any) -> None:
        self.note("end_task")
        super().end_task(task)

    def predict(self, x: Tensor) -> Tensor:
        self.note("predict")
        return super().predict(x)


class CastingOnce(Casting):
    """The same with one loss, which is computed when the method is called."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        self.note("loss")
        return self.local_cross_entropy(self.features(x), y)


CASTS: dict[str, set[bool]] = {}


@pytest.mark.parametrize("kind", ["Casting", "CastingOnce"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_method_computes_in_the_precision_of_the_run(kind, precision, tmp_path):
    CASTS.clear()
    run_toy(tmp_path, *PROBE, f"method._target_=test_trainer.{kind}", f"trainer.precision={precision}", "trainer.epochs=1")
    assert {name: {precision == "bf16"} for name in ("begin_task", "loss", "end_task", "predict")} == CASTS


def test_a_batch_is_computed_in_as_many_parts_as_asked_for(tmp_path, monkeypatch):
    sizes, original = [], LinearProbe.loss
    monkeypatch.setattr(LinearProbe, "loss", lambda self, x, y: sizes.append(len(x)) or original(self, x, y))
    run_toy(tmp_path, *PROBE, "trainer.grad_accumulation=3", "trainer.epochs=1")
    assert sizes == [3, 3, 2, 3, 3, 2, 1, 1] * 2, "batches of 8, 8 and 2"


def test_checkpointing_of_gradients_reaches_the_backbone(tmp_path, monkeypatch):
    seen, original = set(), InfLoRA.loss

    def loss(self: InfLoRA, x: Tensor, y: Tensor) -> Tensor:
        seen.add(self.backbone.grad_checkpointing)
        return original(self, x, y)

    monkeypatch.setattr(InfLoRA, "loss", loss)
    for is_on in (False, True):
        run_toy(tmp_path / str(is_on), *TWO_TASKS, "trainer.epochs=1", f"trainer.grad_checkpointing={is_on}")
        assert seen == {is_on}
        seen.clear()
    assert results(tmp_path / "True")["matrices"] == results(tmp_path / "False")["matrices"]


def test_gradients_are_clipped_to_the_norm(tmp_path, monkeypatch):
    norms = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run_toy(tmp_path / "free", *PROBE, "optimizer=sgd", "trainer.epochs=1")
    assert min(norms) > 0.01
    norms.clear()
    run_toy(tmp_path / "clipped", *PROBE, "optimizer=sgd", "trainer.epochs=1", "trainer.grad_clip=0.01")
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


@pytest.mark.parametrize("target", ["toy.TwoSteps", "inflora.methods.linear_probe.LinearProbe"])
def test_a_batch_in_parts_is_the_same_step(target, tmp_path):
    """The last batch of an epoch holds two images: fewer than the parts."""
    arguments = [*PROBE, f"method._target_={target}", "optimizer=sgd", "optimizer.head_lr=1", "trainer.grad_clip=0.5"]
    folders = {parts: tmp_path / str(parts) for parts in (1, 3)}
    for parts, folder in folders.items():
        run_toy(folder, *arguments, f"trainer.grad_accumulation={parts}")
    whole, cut = ([event["loss"] for event in read_events(folder, "epoch")] for folder in folders.values())
    assert cut == pytest.approx(whole, rel=1e-5)
    whole, cut = (checkpoint.CheckpointFolder(folder / "checkpoints").latest()["method"]["tensors"] for folder in folders.values())  # type: ignore[index]
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target, steps", [("inflora.methods.linear_probe.LinearProbe", 1), ("toy.TwoSteps", 2)])
def test_training_as_written_by_hand(target, steps, tmp_path):
    """The whole loop against ten lines of plain torch."""
    folder, method = tmp_path / "run", ["method=linear_probe", f"method._target_={target}"]
    run_toy(folder, *method, "dataset.num_tasks=1", "trainer.epochs=3", "optimizer=sgd", "optimizer.lr=0.1", "scheduler=constant")
    state = checkpoint.CheckpointFolder(folder / "checkpoints").latest()
    start = checkpoint.load(folder / "checkpoints" / "base.safetensors")
    assert state is not None
    vit = toy.toy_vit()
    vit.load_state_dict({k.removeprefix("backbone."): v for k, v in start["method"]["tensors"].items()})
    task = toy.sequence(1)[0]
    from inflora.seeding import seed_everything

    seed_everything(0, "begin", 0)
    head = nn.Linear(toy.EMBED_DIM, 6)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    losses, last = [], 0.0
    for epoch in range(3):
        losses.append([])
        for x, y in task.batches("train", stream="fit", epoch=epoch):
            with torch.no_grad():
                features = vit(x)
            for _ in range(steps):
                loss = nn.functional.cross_entropy(head(features), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                last = loss.item()
            losses[-1].append(last)
    torch.testing.assert_close(state["method"]["tensors"]["heads.heads.0.weight"], head.weight.detach())
    found = [event["loss"] for event in read_events(folder, "epoch")]
    assert found == pytest.approx([np.mean(epoch) for epoch in losses], rel=1e-4)


# ---- several processes -------------------------------------------------------------------------------------------------------------


def test_gradients_are_summed_and_missing_ones_stay_missing(monkeypatch):
    """As in one process: an optimiser passes over what is frozen, or what a loss does not depend on."""
    both, other, neither = (nn.Parameter(torch.zeros(size)) for size in (2, 3, 1))
    both.grad = torch.tensor([1.0, 2.0])
    of_the_other_process = torch.tensor([10.0, 20.0, 3.0, 4.0, 5.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(trainer, "sum_over_processes", lambda flat: flat.add_(of_the_other_process))
    assert trainer.sum_gradients([both, other, neither], False).item() is True, "the other process was asked to stop"
    assert both.grad.tolist() == [11.0, 22.0]
    assert other.grad is not None and other.grad.tolist() == [3.0, 4.0, 5.0]
    assert neither.grad is None


def test_a_process_without_images_takes_part_in_every_step(monkeypatch):
    loop = object.__new__(trainer.Trainer)
    loop.fabric = SimpleNamespace(world_size=2, device="cpu", autocast=contextlib.nullcontext)  # type: ignore[assignment]
    method = toy.TwoSteps(toy.toy_vit())
    method.begin_task(toy.sequence(1)[0])
    x, y = torch.zeros(1, 3, toy.IMAGE_SIZE, toy.IMAGE_SIZE), torch.zeros(1, dtype=torch.long)
    answers = iter([1, 1, 0])  # of the other process, which has the image: two losses, then no more
    monkeypatch.setattr(trainer, "sum_over_processes", lambda flag: flag + next(answers))
    assert list(loop._losses(method, x[:0], y[:0], global_size=1)) == [None, None]
    monkeypatch.setattr(trainer, "sum_over_processes", lambda flag: flag)
    assert [loss is not None and loss.item() > 0 for loss in loop._losses(method, x, y, global_size=1)] == [True, True]


def test_several_processes_stop_where_their_gradients_agreed_to(monkeypatch):
    """The votes of a step are known after the next one: until then they are on their way."""
    loop = object.__new__(trainer.Trainer)
    loop.fabric, loop.grad_clip = SimpleNamespace(world_size=2), None  # type: ignore[assignment]
    loop._stop_vote, loop._stop_requested = trainer.Arriving(torch.tensor(False)), False
    votes = iter([False, True, False])
    monkeypatch.setattr(trainer, "sum_gradients", lambda parameters, flag: torch.tensor(next(votes)))
    monkeypatch.setattr(loop, "_backward_passes", lambda *_: iter([torch.zeros(())]))
    weight = nn.Parameter(torch.zeros(1))
    method, meter = SimpleNamespace(after_step=lambda: None), SimpleNamespace(add=lambda loss, share: None)
    arguments: Any = (method, torch.optim.SGD([weight], lr=1), torch.zeros(1), torch.zeros(1), 2, meter)
    assert [loop._step(*arguments) for _ in range(3)] == [False, False, True]


def test_after_a_task_processes_stop_for_the_one_that_was_asked_to(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "sum_over_processes", lambda tensor: tensor + 1 if tensor.ndim == 0 else tensor)
        with pytest.raises(Interrupted):
            run_toy(tmp_path, *PROBE)
    assert [event["task"] for event in read_events(tmp_path, "task")] == [0]
    run_toy(tmp_path, *PROBE)
    assert [event["task"] for event in read_events(tmp_path, "task")] == [0, 1]


def test_scores_that_are_no_numbers_in_another_process_end_all(monkeypatch):
    tasks = toy.sequence(1)
    method = LinearProbe(toy.toy_vit())
    method.begin_task(tasks[0])
    monkeypatch.setattr(trainer, "sum_over_processes", lambda tensor: tensor.add_(1) if tensor.ndim == 0 else tensor)
    with pytest.raises(trainer.TrainingError, match="scores of test images are nan"):
        evaluate(method, tasks.tasks, tasks.class_to_task, Fabric(accelerator="cpu", plugins=[LightningEnvironment()]))


@pytest.mark.parametrize("is_first", [True, False])
def test_processes_agree_on_what_was_found_outside_training(is_first, monkeypatch):
    """Another kind of processor may round a decomposition to another branch."""
    own, first = build(["method=inflora"]), build(["method=inflora"])
    for seed, method in enumerate((own, first)):
        method.begin_task(toy.sequence(seed=seed)[0])  # of other augmented images
    loop = object.__new__(trainer.Trainer)
    loop.fabric = SimpleNamespace(world_size=2, is_global_zero=is_first)  # type: ignore[assignment]
    brought = []
    monkeypatch.setattr(trainer, "from_first", lambda state: brought.append(state) or (state if is_first else first.state_dict()))
    before = fingerprint(own.state_dict()["tensors"])
    loop._agree(own)
    assert bool(brought[0]) == is_first, "the others need not send theirs"
    after = fingerprint(own.state_dict()["tensors"])
    assert (after == before) == is_first and (after == fingerprint(first.state_dict()["tensors"])) != is_first


def test_processes_agree_before_and_after_training(tmp_path, monkeypatch):
    calls = []

    def tell(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: [calls.append(name), original(*arguments)][1])

    for owner, name in ((InfLoRA, "begin_task"), (trainer.Trainer, "_agree"), (trainer.Trainer, "_fit"), (InfLoRA, "end_task")):
        tell(owner, name)
    run_toy(tmp_path, *TWO_TASKS)
    assert calls == 2 * ["begin_task", "_agree", "_fit", "end_task", "_agree"]


def test_whatever_writes_fails_in_all_processes(tmp_path, monkeypatch):
    """A disk that is full for one process must not leave the others waiting."""
    inside, wrote = [False], set()

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            what = arguments[1] if owner is trackers.Trackers else name  # the event
            wrote.add(what)
            assert inside[0] or what == "summary", f"{what} outside failing_together"  # the last word, when nobody waits any more
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(trainer, "failing_together", together)
    watch(trainer, "write_matrix")
    watch(checkpoint.CheckpointFolder, "save")
    watch(trainer.Trainer, "_restore")
    watch(trackers.Trackers, "log")
    run_toy(tmp_path, *PROBE)
    assert wrote == {"write_matrix", "save", "_restore", "run", "epoch", "task", "summary"}


def test_a_meter_adds_up_what_all_processes_found(monkeypatch):
    method = Method(toy.toy_vit())
    stopped = {"epoch": 0, "step": 1, "losses": torch.tensor([4.0]), "hits": 3, "answers": 8}  # of all processes, so it counts once
    meter = trainer.Meter(stopped, toy.sequence(1)[0], 0)
    meter.add(torch.tensor(2.0), share=0.25)
    method.observe(torch.eye(2), torch.tensor([0, 0]))  # one right answer of two
    other = {1: torch.tensor([3.0]), 2: torch.tensor([5, 6])}  # the other process's loss, and its answers
    monkeypatch.setattr(trainer, "sum_over_processes", lambda own: own + other[len(own)])
    assert meter.losses().tolist() == [4.0, 2.0 * 0.25 + 3.0]
    assert meter.total_hits(method) == (3 + 1 + 5, 8 + 2 + 6)
    assert meter.recent_loss() == 2.0, "the display shows this process's own"


# ---- testing -----------------------------------------------------------------------------------------------------------------------


def test_evaluate_counts_as_a_loop_over_images_does():
    tasks = toy.sequence(3, task_sizes=[3, 1, 2], eval_batch_size=5)
    method = LinearProbe(toy.toy_vit())
    for task in tasks:
        method.begin_task(task)
    rates = evaluate(method, tasks.tasks, tasks.class_to_task, Fabric(accelerator="cpu", plugins=[LightningEnvironment()]))
    expected = np.zeros((3, 3))
    bounds = [(0, 3), (3, 4), (4, 6)]
    for t, task in enumerate(tasks):
        for x, y in task.test_batches():
            for image, label in zip(x, y.tolist(), strict=True):
                with torch.no_grad():
                    scores = method.predict(image[None])[0]
                best = int(scores.argmax())
                start, stop = bounds[t]
                hits = best == label, start + int(scores[start:stop].argmax()) == label, start <= best < stop
                expected[:, t] += np.array(hits) / task.num_test
    np.testing.assert_allclose(rates, expected, atol=1e-12)
    assert not method.training


# ---- stopping and going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody catches it: as near to a kill as one process can come. test_resume_slow.py has real ones."""


def count_and_kill(monkeypatch: pytest.MonkeyPatch, kill_at: int | None) -> list[str]:
    """Every call that does or saves something counts; the one numbered `kill_at` does not happen any more."""
    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == kill_at:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in ("begin_task", "loss", "end_task", "predict"):
        watch(InfLoRA, name)
    watch(checkpoint, "write_atomically")
    watch(run, "write_atomically")
    watch(run_folder, "write_atomically")
    watch(trackers, "write_atomically")
    watch(trackers.JsonlTracker, "log")
    return calls


@pytest.mark.parametrize("epochs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_anywhere_a_run_ends_with_the_same_bits(epochs, tmp_path):
    short = [*TWO_TASKS, "+dataset.options.num_classes=4", "trainer.batch_size=6", f"trainer.epochs={epochs}"]
    with pytest.MonkeyPatch.context() as patch:
        calls = count_and_kill(patch, None)
        run_toy(tmp_path / "whole", *short)
    assert calls[0] == "write_atomically", "the configuration, before anything is done"
    assert calls.count("loss") == 4 * epochs and calls.count("begin_task") == calls.count("end_task") == 2
    whole = results(tmp_path / "whole")
    for position, name in enumerate(calls):
        folder = tmp_path / f"killed at {position}"
        with pytest.MonkeyPatch.context() as patch:
            count_and_kill(patch, position)
            with pytest.raises(Killed):
                run_toy(folder, *short)
        run_toy(folder, *short)
        assert results(folder) == whole, f"killed at call {position}, {name}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=sequential"],
        ["method=sequential_full"],
        ["method=joint"],
        ["method=linear_probe", "method._target_=toy.TwoSteps"],
        ["method._target_=test_trainer.Dropping"],  # draws random numbers in every step
    ],
)
def test_every_kind_of_method_goes_on_inside_a_stage(overrides, tmp_path, monkeypatch):
    run_toy(tmp_path / "whole", *TWO_TASKS, *overrides)
    folder = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGTERM, at=3 if "method=joint" in overrides else 7)
        with pytest.raises(Interrupted):
            run_toy(folder, *TWO_TASKS, *overrides)
    run_toy(folder, *TWO_TASKS, *overrides)
    assert results(folder) == results(tmp_path / "whole")


def stop_in(patch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals, at: int) -> list[int]:
    """Raise a signal in call `at` of a function."""
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] == at:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, signalled)
    return calls


def test_a_signal_stops_after_the_batch_and_nothing_is_done_twice(tmp_path):
    run_toy(tmp_path / "whole", *TWO_TASKS)
    whole = results(tmp_path / "whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for at in range(12):  # every batch of the run
        folder = tmp_path / f"stopped in batch {at}"
        with pytest.MonkeyPatch.context() as patch:
            calls = stop_in(patch, InfLoRA, "loss", (signal.SIGINT, signal.SIGTERM)[at % 2], at)
            with pytest.raises(Interrupted):
                run_toy(folder, *TWO_TASKS)
            assert len(calls) == at + 1
            assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
            run_toy(folder, *TWO_TASKS)
            assert len(calls) == 12
        assert results(folder) == whole, f"stopped in batch {at}"


@pytest.mark.parametrize("owner, name, at", [(InfLoRA, "begin_task", 1), (InfLoRA, "end_task", 0), (trainer, "evaluate", 1)])
def test_a_signal_between_batches_waits_for_a_safe_point(owner, name, at, tmp_path):
    run_toy(tmp_path / "whole", *TWO_TASKS)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, owner, name, signal.SIGTERM, at)
        with pytest.raises(Interrupted):
            run_toy(tmp_path / "stopped", *TWO_TASKS)
    run_toy(tmp_path / "stopped", *TWO_TASKS)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    original = InfLoRA.loss
    calls = []

    def loss(self: InfLoRA, x: Tensor, y: Tensor) -> Tensor:
        calls.append("loss")
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # a machine's scheduler may ask more than once; that is no reason to hurry
            calls.append("in no hurry")
            signal.raise_signal(signal.SIGINT)
        return original(self, x, y)

    monkeypatch.setattr(InfLoRA, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, *TWO_TASKS)
    assert calls == ["loss"] * 4 + ["in no hurry"]
    monkeypatch.setattr(InfLoRA, "loss", original)
    run_toy(tmp_path, *TWO_TASKS)
    assert num_rows(tmp_path) == 2


def test_the_clocks_of_a_stopped_run_are_added_up(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    original = LinearProbe.loss

    def loss(self: LinearProbe, x: Tensor, y: Tensor) -> Any:
        clock[0] += 10
        return original(self, x, y)

    monkeypatch.setattr(LinearProbe, "loss", loss)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGINT, at=7)
        with pytest.raises(Interrupted):
            run_toy(tmp_path, *PROBE)
    clock[0] += 5000  # time in which the run did not run
    wall = run_toy(tmp_path, *PROBE)["wall_seconds"]
    assert wall == {"subspace": 0.0, "train": 120.0, "evaluate": 0.0, "other": 0.0, "total": 120.0}


def test_a_stopped_epoch_reports_the_speed_of_what_it_did(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    original = LinearProbe.loss

    def loss(self: LinearProbe, x: Tensor, y: Tensor) -> Any:
        clock[0] += len(x)
        return original(self, x, y)

    monkeypatch.setattr(LinearProbe, "loss", loss)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGINT, at=1)
        with pytest.raises(Interrupted):
            run_toy(tmp_path, *PROBE)
    run_toy(tmp_path, *PROBE)
    assert [event["images_per_second"] for event in read_events(tmp_path, "epoch")] == [1.0] * 4


def test_a_method_in_training_mode_is_not_what_tasks_begin_with(tmp_path):
    """A backbone with dropout looks at the task's images the same way in a run that goes on between two tasks."""
    common = [*TWO_TASKS, "method._target_=test_trainer.Dropping"]
    run_toy(tmp_path / "whole", *common)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, InfLoRA, "end_task", signal.SIGTERM, at=0)
        with pytest.raises(Interrupted):
            run_toy(tmp_path / "stopped", *common)
    run_toy(tmp_path / "stopped", *common)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_what_a_loss_draws_does_not_depend_on_where_a_run_was_stopped(tmp_path):
    common = [*TWO_TASKS, "method._target_=test_trainer.Dropping"]
    run_toy(tmp_path / "whole", *common)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGTERM, at=1)
        with pytest.raises(Interrupted):
            run_toy(tmp_path / "stopped", *common)
    run_toy(tmp_path / "stopped", *common)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


class Dropping(InfLoRA):
    """InfLoRA on a backbone with dropout."""

    def __init__(self, backbone: Any, **arguments: Any) -> None:
        super().__init__(backbone, **arguments)
        backbone.pos_drop.p = 0.5


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    run_toy(tmp_path / "whole", *TWO_TASKS)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGTERM, at=4)
        with pytest.raises(Interrupted):
            run_toy(tmp_path / "stopped", *TWO_TASKS)
    newest = sorted((tmp_path / "stopped" / "checkpoints").glob("0*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    run_toy(tmp_path / "stopped", *TWO_TASKS)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_mixed_precision_goes_on_too(tmp_path):
    common = [*TWO_TASKS, "trainer.precision=bf16"]
    run_toy(tmp_path / "whole", *common)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGTERM, at=7)
        with pytest.raises(Interrupted):
            run_toy(tmp_path / "stopped", *common)
    run_toy(tmp_path / "stopped", *common)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    weights = checkpoint.CheckpointFolder(tmp_path / "whole" / "checkpoints").latest()
    assert weights is not None
    assert {value.dtype for value in weights["method"]["tensors"].values()} == {torch.float32}


def test_the_scale_of_half_precision_goes_on(tmp_path, monkeypatch):
    """As a CPU has none, the precision of Fabric is made to tell one."""
    restored = []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 8.0})
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: restored.append(state))
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, trainer.Trainer, "_step", signal.SIGTERM, at=4)
        with pytest.raises(Interrupted):
            run_toy(tmp_path, *PROBE)
    run_toy(tmp_path, *PROBE)
    assert restored == [{"scale": 8.0}]


def test_progress_is_not_drawn_where_there_is_no_terminal(tmp_path, capsys):
    run_toy(tmp_path, *PROBE, "trainer.progress=true", "trainer.epochs=1")
    assert "%" not in capsys.readouterr().err.replace(" % over", "").replace(" % with", "")


def test_progress_is_drawn_on_a_terminal(tmp_path, monkeypatch):
    from io import StringIO

    from rich.console import Console

    from inflora import progress

    screen = StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=150))
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    run_toy(tmp_path, *PROBE, "trainer.progress=true")
    drawn = screen.getvalue()
    assert "task 2/2" in drawn and "epoch 2/2" in drawn and "loss" in drawn and "images/s" in drawn and "100 %" in drawn
    epochs = read_events(tmp_path, "epoch")
    assert all(0 <= event["training_accuracy"] <= 100 for event in epochs)


def test_the_progress_display_changes_no_number(tmp_path, monkeypatch):
    from io import StringIO

    from rich.console import Console

    from inflora import progress

    run_toy(tmp_path / "without", *PROBE)
    monkeypatch.setattr(progress, "console", Console(file=StringIO(), force_terminal=True, width=150))
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    run_toy(tmp_path / "with", *PROBE, "trainer.progress=true")
    assert results(tmp_path / "with") == results(tmp_path / "without")


def test_json_of_a_run_is_strict_even_where_a_method_says_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(LinearProbe, "diagnostics", lambda self: {"odd": float("nan"), "array": np.ones(2), "folder": Path("x")})
    run_toy(tmp_path, *PROBE, "trainer.epochs=1")
    (first, _) = read_events(tmp_path, "task")
    assert (first["odd"], first["array"], first["folder"]) == (None, [1.0, 1.0], "x")
    assert json.loads((tmp_path / "summary.json").read_text())["num_tasks"] == 2


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same(tmp_path):
    """Also where the covariance passes hang hooks on its layers."""
    pytest.importorskip("torch._inductor")
    run_toy(tmp_path / "plain", *TWO_TASKS)
    run_toy(tmp_path / "compiled", *TWO_TASKS, "trainer.compile=true")
    for plain, compiled in zip(read_events(tmp_path / "plain"), read_events(tmp_path / "compiled"), strict=True):
        assert plain.get("protected_dimensions") == compiled.get("protected_dimensions")
        if plain["event"] == "epoch":
            assert plain["loss"] == pytest.approx(compiled["loss"], rel=1e-4)


# ---- faults ------------------------------------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_end_the_run():
    tasks = toy.sequence(1)
    method = LinearProbe(toy.toy_vit())
    method.begin_task(tasks[0])
    with torch.no_grad():
        method.heads.current.weight[0, 0] = float("nan")
    with pytest.raises(trainer.TrainingError, match="scores of test images are nan"):
        evaluate(method, tasks.tasks, tasks.class_to_task, Fabric(accelerator="cpu", plugins=[LightningEnvironment()]))


@pytest.mark.parametrize("other", [(1, -1, -1), (0, 2, 0), (0, 1, 3)])
def test_processes_go_on_from_one_place(other, monkeypatch):
    loop = object.__new__(trainer.Trainer)
    loop.folder = Path("run")
    inside = {"epoch": 1, "step": 0}
    monkeypatch.setattr(trainer, "gather_objects", lambda own: [own, own])
    loop._check_position(0, inside)
    monkeypatch.setattr(trainer, "gather_objects", lambda own: [own, other])
    with pytest.raises(trainer.CheckpointError, match="the processes found different checkpoints in run; the machines have to share this"):
        loop._check_position(0, inside)
