"""The continual-learning loop: train on one task after the other, test on all seen, record, checkpoint, resume.

The loop is `Trainer.run`. It knows the `Method` contract and never a concrete method.
"""

import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointError as RecomputationError

from inflora.checkpoint import CheckpointError, CheckpointFolder
from inflora.data.tasks import Task, TaskSequence
from inflora.device import Arriving, to_device
from inflora.interference import InterferenceProbe
from inflora.method import Method
from inflora.metrics import TestCounter
from inflora.parts.collective import failing_together, from_first, gather_objects, sum_over_processes
from inflora.progress import Display
from inflora.results import Records, stored_parameters
from inflora.seeding import seed_everything
from inflora.trackers import Trackers, write_matrix

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to do."""


class Interrupted(Exception):
    """The user, or the machine's scheduler, asked the run to stop; everything needed to continue has been saved."""


class Trainer:
    """Runs a method over a task sequence.

    Args:
        fabric: devices, processes and precision.
        epochs: passes over the data of each task.
        optimizer: makes an optimiser from parameter groups, e.g. a partial of `torch.optim.Adam`.
        lr: rate of the groups with role "branch".
        head_lr: rate of the groups with role "head".
        schedule: (epoch, epochs) -> factor on both rates.
        grad_clip: largest 2-norm of the gradient over all trained parameters; None: no clipping.
        grad_accumulation: parts that a batch is computed in, one after the other, to need less memory; the step is that of the whole batch,
            but a loss that compares the images of a batch sees those of a part only.
        seed: the run's seed.
        folder: the run folder: a checkpoint after every epoch and task, and the matrices.
        records: filled in as the run goes.
        trackers: told about every epoch and task.
        show_progress: draw a progress bar.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        epochs: int,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        head_lr: float,
        schedule: Callable[[int, int], float],
        grad_clip: float | None,
        grad_accumulation: int,
        seed: int,
        folder: Path,
        records: Records,
        trackers: Trackers,
        show_progress: bool,
    ) -> None:
        self.fabric = fabric
        self.epochs = epochs
        self.make_optimizer = optimizer
        self.rates = {"branch": lr, "head": head_lr}
        self.schedule = schedule
        self.grad_clip = grad_clip
        self.grad_accumulation = grad_accumulation
        self.seed = seed
        self.folder = folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.records = records
        self.trackers = trackers
        self.show_progress = show_progress
        self.probe = InterferenceProbe()
        self._stop_requested = False
        self._stop_vote = Arriving(torch.tensor(False))  # whether any process was asked to stop before its latest step

    # ---- the loop ----

    def run(self, method: Method, sequence: TaskSequence, plan: dict[str, Any]) -> None:
        """Train on every task of the sequence that is not done yet, filling `records`.

        Args:
            plan: what the run is about to do, for the trackers.

        Raises:
            TrainingError: if a loss is not finite.
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            CheckpointError: if a checkpoint cannot be written or read.
        """
        with failing_together():
            first_stage, inside = self._restore(method, plan)
        self._check_position(first_stage, inside)
        tasks = itertools.islice(sequence, first_stage, None)
        with self._stop_signals(), Display(sequence, self.epochs, self.show_progress and self.fabric.is_global_zero) as display:
            for task in tasks:
                method.task = task
                if inside is None:
                    method.eval()  # also before the first task: what a task begins with must not depend on whether a run was stopped
                    self._seed("begin", task)
                    self.probe.before(method.backbone)
                    with self.records.clock("subspace"), self.fabric.autocast(), eagerly(method.backbone):
                        method.begin_task(task)
                        self._agree(method)
                with self.records.clock("train"):
                    self._fit(method, task, inside, display)
                self._seed("end", task)
                with self.records.clock("subspace"), self.fabric.autocast(), eagerly(method.backbone):
                    method.eval()
                    method.end_task(task)
                    self._agree(method)
                with self.records.clock("evaluate"):
                    self._test(method, sequence, task)
                self._save(method, {"stage": task.index + 1}, f"task{task.index}", boundary=True)
                inside = None

    def _fit(self, method: Method, task: Task, inside: dict[str, Any] | None, display: Display) -> None:
        groups = trainable_groups(method, self.rates)
        counts = {role: sum(p.numel() for group in groups if group["role"] == role for p in group["params"]) for role in self.rates}
        if inside is None:
            self.records.trainable_parameters.append(sum(counts.values()))
        numbers = " + ".join(f"{count:,} {role}" for role, count in counts.items() if count) or "nothing"
        log.info("task %d: %d classes, %d images; trains %s parameters", task.index, task.num_classes, task.num_train, numbers)
        if not groups:
            return
        # Copies of the groups: torch keeps the dictionaries it is given, and setting a rate there would change the base rates here.
        optimizer: Any = self.fabric.setup_optimizers(self.make_optimizer([dict(group) for group in groups]))
        position = inside or {"epoch": 0, "step": 0, "losses": torch.zeros(0), "hits": 0, "answers": 0}
        if "optimizer" in position:
            optimizer.load_state_dict(position["optimizer"])
        display.start_task(task, position["epoch"])
        for epoch in range(position["epoch"], self.epochs):
            for group, base in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = base["lr"] * self.schedule(epoch, self.epochs)
            batches = task.batches("train", stream="fit", epoch=epoch)
            self._seed("fit", task, epoch)
            method.train()
            method.begin_epoch(epoch)
            meter = Meter(position if epoch == position["epoch"] else None, task, epoch)
            began, images = time.monotonic(), sum(batches.global_size(step) for step in range(meter.step, len(batches)))
            for step, (x, y) in enumerate(batches.starting_at(meter.step), start=meter.step):
                self._seed("fit", task, epoch, step)  # a step's draws (dropout, a replay buffer's) are the same after a stop before it
                method.sample_ids = batches.sample_ids(step)
                stop = self._step(method, optimizer, x, y, batches.global_size(step), meter)
                display.step(batches.global_size(step), meter, method)
                if stop:
                    self._save_inside(method, optimizer, task, meter.state(method, epoch, step + 1))
                    raise Interrupted
            self._end_epoch(method, optimizer, task, epoch, meter, images, began)

    def _step(self, method: Method, optimizer: Any, x: Tensor, y: Tensor, global_size: int, meter: "Meter") -> bool:
        """One batch: the optimiser steps of every loss the method gives.

        Returns:
            Whether the run shall stop. A signal may come between any two lines, so several processes do what they agreed with the
            gradients of the batch before: this one's are still on their way.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        latest, vote_before = None, self._stop_vote
        optimizer.zero_grad()
        for loss in self._backward_passes(method, x, y, global_size):
            if self.fabric.world_size > 1:
                self._stop_vote = Arriving(sum_gradients(parameters, self._stop_requested))
            if self.grad_clip is not None:
                self.fabric.clip_gradients(method, optimizer, max_norm=self.grad_clip, error_if_nonfinite=False)
            optimizer.step()
            method.after_step()
            optimizer.zero_grad()
            latest = loss
        meter.add(torch.zeros((), device=x.device) if latest is None else latest, len(x) / global_size)
        return bool(vote_before.get()) if self.fabric.world_size > 1 else self._stop_requested

    def _backward_passes(self, method: Method, x: Tensor, y: Tensor, global_size: int) -> Iterator[Tensor | None]:
        """The gradients of every loss that the method gives for the batch, computed when asked for.

        Yields:
            The loss over this process's images, without graph; None where it has none.
        """
        parts = min(self.grad_accumulation, max(1, len(x)))
        images, labels = x.tensor_split(parts), y.tensor_split(parts)
        ids = method.sample_ids
        ids_of_parts = ids.tensor_split(parts)
        losses = [self._losses(method, *part, global_size) for part in zip(images, labels, strict=True)]

        def tell(ids: Tensor) -> None:
            if parts > 1:  # else it knows them; to tell it visits every module
                method.sample_ids = ids

        while True:
            total, state = None, torch.get_rng_state() if parts > 1 else None
            for part, part_losses in enumerate(losses):
                tell(ids_of_parts[part])
                if part and state is not None:  # what is drawn by image (dropout, replay) is to be what the whole batch draws
                    torch.set_rng_state(state)
                try:
                    loss = next(part_losses)
                except StopIteration:
                    tell(ids)
                    return
                if loss is not None:
                    self._backward(loss, len(images[part]) / global_size)
                    weighted = loss.detach() * (len(images[part]) / len(x))
                    total = weighted if total is None else total + weighted
            tell(ids)
            yield total

    def _backward(self, loss: Tensor, share: float) -> None:
        """Adds to the gradients: a process, or a part, weighs as many images as it has, so that the sum is the mean over the batch."""
        if not loss.requires_grad:
            return
        try:
            self.fabric.backward(loss * share if share != 1 else loss)
        except RecomputationError as error:
            raise TrainingError(
                "this method's forward pass cannot be computed again for its gradient; set trainer.grad_checkpointing=false, and "
                "trainer.grad_accumulation=2 or more to need less memory"
            ) from error

    def _losses(self, method: Method, x: Tensor, y: Tensor, global_size: int) -> Iterator[Tensor | None]:
        """The method's losses, each computed when asked for, under mixed precision.

        A process without images gives None as often as the others give a loss: they meet at every step to sum the gradients.
        """
        losses: Iterator[Tensor] = iter(())
        if len(x) > 0:
            with self.fabric.autocast():
                found = method.loss(x, y)
            losses = iter([found]) if isinstance(found, Tensor) else found
        while True:
            with self.fabric.autocast():
                loss = next(losses, None)
            is_step = loss is not None
            if global_size < self.fabric.world_size:  # somebody has no images
                is_step = self._in_any_process(is_step)
            if not is_step:
                return
            yield loss

    def _end_epoch(self, method: Method, optimizer: Any, task: Task, epoch: int, meter: "Meter", images: int, began: float) -> None:
        losses = meter.losses()
        meter.check(losses)  # which waits for the device, so that the speed below is not that of handing it work
        if not torch.stack([p.isfinite().all() for group in optimizer.param_groups for p in group["params"]]).all():
            meter.refuse("a weight is no longer finite after")
        right, answers = meter.total_hits(method)
        event = {
            "task": task.index,
            "epoch": epoch,
            "loss": losses.mean().item(),
            "training_accuracy": 100 * right / answers if answers else None,
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_second": images / max(time.monotonic() - began, 1e-9),
        }
        with failing_together():
            self.trackers.log("epoch", event)
        self._save_inside(method, optimizer, task, Meter(None, task, epoch + 1).state(method, epoch + 1, 0))

    # ---- testing ----

    def _test(self, method: Method, sequence: TaskSequence, task: Task) -> None:
        older_tasks = [] if method.stream == "joint" else sequence.seen(task)[:-1]
        rates = evaluate(method, sequence.seen(task), sequence.class_to_task, self.fabric)
        self.records.add(len(sequence.seen(task)) - 1, rates)
        event = {
            "task": task.index,
            **self.records.latest(sequence.test_counts),
            "interference": self.probe.after(method.backbone, older_tasks),
            "wall_seconds": self.records.timings(),
            "stored_parameters": stored_parameters(method),
            "peak_memory_bytes": self.records.peak_memory_bytes,
            **method.diagnostics(),
        }
        with failing_together():
            self.trackers.log("task", event)
            if self.fabric.is_global_zero:
                write_matrix(self.folder / "accuracy_matrix.csv", self.records.matrices[0])
                write_matrix(self.folder / "task_aware_matrix.csv", self.records.matrices[1])
        numbers = event["accuracy"], event["task_aware_accuracy"]
        log.info("task %d: accuracy %.2f %% over all seen classes, %.2f %% with the task given", task.index, *numbers)

    # ---- checkpoints ----

    def _restore(self, method: Method, plan: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Bring the method to where the run stopped; returns the stage, and the position inside it if it had begun training."""
        state = self.checkpoints.latest()
        if state is None:
            if self.fabric.is_global_zero:
                self.checkpoints.save_base({"method": method.state_dict()})
            self.trackers.rewind(0)
            self.trackers.log("run", plan)
            return 0, None
        inside = state["position"] if "epoch" in state["position"] else None
        stage = state["position"]["stage"]
        if inside is not None and stage > 0:  # the probe compares with the weights at the end of the task before
            boundary = self.checkpoints.latest_boundary()
            if boundary is None:
                raise CheckpointError(
                    f"no checkpoint of a task's end is left in {self.checkpoints.path}; remove the folder to start this run again"
                )
            method.load_state_dict(boundary["method"])
            self.probe.before(method.backbone)
        method.load_state_dict(state["method"])
        if "precision" in state["position"]:
            self.fabric.strategy.precision.load_state_dict(state["position"]["precision"])
        self.records.load_state_dict(state["records"])
        self.trackers.rewind(state["trackers"])
        if state["records"]["matrices"].shape[1] < self.records.matrices.shape[1]:  # a finished sequence goes on with further tasks
            self.trackers.log("run", plan)
        return stage, inside

    def _check_position(self, stage: int, inside: dict[str, Any] | None) -> None:
        """Raises CheckpointError in all processes if they go on from different places: each would wait for what the others do not do."""
        own = (stage, inside["epoch"], inside["step"]) if inside else (stage, -1, -1)
        if len(set(gather_objects(own))) > 1:
            raise CheckpointError(f"the processes found different checkpoints in {self.folder}; the machines have to share this folder")

    def _save_inside(self, method: Method, optimizer: Any, task: Task, position: dict[str, Any]) -> None:
        position |= {"stage": task.index, "optimizer": optimizer.state_dict()}
        self._save(method, position, f"task{task.index}_epoch{position['epoch']}_step{position['step']}")

    def _save(self, method: Method, position: dict[str, Any], tag: str, *, boundary: bool = False) -> None:
        with failing_together():
            if self.fabric.is_global_zero:
                state = {
                    "position": position | {"precision": self.fabric.strategy.precision.state_dict()},  # the scale of float16's gradients
                    "method": method.state_dict(),
                    "records": self.records.state_dict(),
                    "trackers": self.trackers.position(),
                }
                self.checkpoints.save(state, tag, boundary=boundary)
        if boundary and self._in_any_process(self._stop_requested):
            raise Interrupted

    # ---- small helpers ----

    def _agree(self, method: Method) -> None:
        """All processes go on with what the first has found before or after training.

        Processors of different kinds round decompositions and clusterings differently. In a sign, or near a threshold, a rounding makes
        another branch, and gradients of different branches would be summed.
        """
        if self.fabric.world_size > 1:
            own = tree_map_only(Tensor, lambda tensor: tensor.cpu(), method.state_dict()) if self.fabric.is_global_zero else {}
            method.load_state_dict(from_first(own))

    def _in_any_process(self, flag: bool) -> bool:
        """Whether the flag is up in any process; each of them has to ask."""
        return bool(sum_over_processes(torch.tensor(int(flag), device=self.fabric.device)) > 0)

    def _seed(self, name: str, task: Task, *keys: int) -> None:
        seed_everything(self.seed, name, task.index, *keys)

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop at the next safe point; a second SIGINT stops at once."""

        def request(number: int, frame: Any) -> None:
            if self._stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_requested = True

        with stop_signals_to(request):
            yield


@contextmanager
def stop_signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler`."""
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


class Meter:
    """Losses and right answers of one epoch, kept on the device so that nothing waits for it.

    What a stopped epoch had found is that of all processes; what is added here is this one's, until a total is asked for.

    Args:
        position: where a stopped epoch goes on; None for a fresh one.
    """

    def __init__(self, position: dict[str, Any] | None, task: Task, epoch: int) -> None:
        self.step: int = position["step"] if position else 0
        self._losses_before: Tensor = position["losses"] if position else torch.zeros(0)
        self._hits_before: tuple[int, int] = (position["hits"], position["answers"]) if position else (0, 0)
        self._losses: list[Tensor] = []
        self._shares: list[float] = []
        self._hits, self._answers = 0, 0
        self.epoch = epoch
        self._where = f"task {task.index}, epoch {epoch}"

    def add(self, loss: Tensor, share: float) -> None:
        """The loss of a batch: over this process's images, which are this share of it."""
        self._losses.append(loss.float())
        self._shares.append(share)

    def losses(self) -> Tensor:
        """(steps,) loss of every batch so far, over all processes: each of them has to ask."""
        if not self._losses:
            return self._losses_before
        new = torch.stack(self._losses)
        new = sum_over_processes(new * new.new_tensor(self._shares))
        return torch.cat([self._losses_before.to(new.device), new])

    def recent_loss(self) -> float:
        """Mean loss of the latest batches; waits for the device."""
        return torch.stack(self._losses[-20:]).mean().item() if self._losses else float("nan")

    def hits(self, method: Method) -> tuple[int, int]:
        """(right answers, answers) of this process."""
        right, answers = method.take_training_hits()
        self._hits, self._answers = self._hits + right, self._answers + answers
        return self._hits, self._answers

    def total_hits(self, method: Method) -> tuple[int, int]:
        """(right answers, answers) of the epoch so far, over all processes: each of them has to ask."""
        right, answers = sum_over_processes(torch.tensor(self.hits(method), device=method.device)).tolist()
        return self._hits_before[0] + right, self._hits_before[1] + answers

    def check(self, losses: Tensor) -> None:
        """Raises TrainingError if a loss is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            self.refuse(f"the loss is {losses[step].item()} at step {step} of")

    def refuse(self, what: str) -> NoReturn:
        """Raises TrainingError: `what`, where, and what to do."""
        raise TrainingError(
            f"{what} {self._where}; start again, in another output_dir, with lower optimizer.lr and optimizer.head_lr, or with "
            "trainer.precision=32"
        )

    def state(self, method: Method, epoch: int, step: int) -> dict[str, Any]:
        """The position to save, after `step` batches of `epoch`."""
        losses = self.losses()
        self.check(losses)
        hits, answers = self.total_hits(method) if step else (0, 0)
        return {"epoch": epoch, "step": step, "losses": losses, "hits": hits, "answers": answers}


def eagerly(backbone: nn.Module) -> AbstractContextManager[Any]:
    """Run a compiled backbone as it is written: a compiled graph does not notice the hooks that a method puts on layers."""
    is_compiled = backbone._compiled_call_impl is not None  # asking first: importing the compiler takes seconds
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def trainable_groups(method: Method, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The method's parameter groups with their learning rates; everything else is frozen, and groups without parameters are left out."""
    method.requires_grad_(False)
    groups = []
    for group in method.param_groups():
        parameters = list(group["params"])
        for parameter in parameters:
            parameter.requires_grad_(True)
        if parameters:
            groups.append({"lr": rates[group["role"]], **group, "params": parameters})
    return groups


def sum_gradients(parameters: Sequence[Tensor], flag: bool) -> Tensor:
    """Sum the gradients over the processes, in one message; returns () whether any process raised its flag, on the gradients' device.

    A parameter that has a gradient in no process gets none: optimisers pass over it, where zeros would still decay and move it. Only a
    process that lacks a gradient waits for the device, to hear whether another has it.
    """
    has_own = [p.grad is not None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    marks = to_device(torch.tensor([*has_own, flag], dtype=gradients[0].dtype), gradients[0].device)
    flat = sum_over_processes(torch.cat([*(gradient.reshape(-1) for gradient in gradients), marks]))
    *sums, marks = flat.split([*(p.numel() for p in parameters), len(marks)])
    has_any = has_own if all(has_own) else (marks[:-1] > 0).tolist()
    for parameter, total, exists in zip(parameters, sums, has_any, strict=True):
        parameter.grad = total.view_as(parameter) if exists else None
    return marks[-1] > 0


@torch.inference_mode()
def evaluate(method: Method, tasks: Sequence[Task], class_to_task: Tensor, fabric: Fabric) -> np.ndarray:
    """Test a method on the test images of some tasks, in one pass.

    Returns:
        (3, num_tasks) shares of each task's images, nan for tasks not tested: class-incremental accuracy, accuracy when the task is given,
        and share whose predicted class belongs to the right task.

    Raises:
        TrainingError: if a score is nan.
    """
    method.eval()
    counter = TestCounter(class_to_task.to(fabric.device))
    for task in tasks:
        for x, y in task.test_batches():
            if len(x):
                with fabric.autocast():
                    scores = method.predict(x)
                counter.update(scores.float(), y)
    sum_over_processes(counter.counts)
    sum_over_processes(counter.num_nan)
    rates = counter.rates()
    if counter.num_nan > 0:
        raise TrainingError("scores of test images are nan; look for nan in the weights, lower optimizer.lr, or use trainer.precision=32")
    return rates
