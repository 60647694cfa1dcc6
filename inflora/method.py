"""The contract of a continual-learning method.

A method is one class in one file `inflora/methods/<name>.py` and one yaml `conf/method/<name>.yaml` that points at it. The trainer calls,
for every training stage (a task, or all tasks at once where `stream = "joint"`):

    method.task = task
    method.begin_task(task)              # grow the heads, add branches, look at the task's images
    groups = method.param_groups()       # what trains: everything else is frozen by the trainer
    for epoch in range(epochs):
        method.begin_epoch(epoch)
        for x, y in batches:
            loss = method.loss(x, y)     # a scalar, or a generator of scalars: one backward and one optimiser step each
            method.after_step()
    method.end_task(task)                # update memories, merge branches
    scores = method.predict(x)           # (B, seen classes)

Methods know nothing of files, devices, processes or trackers: new tensors go to `self.device`, statistics summed over a task's images
go through `parts.collective.sum_over_processes`, and mixed precision is switched on around these calls by the trainer. Sums over processes
belong in `begin_task`, `after_step` and `end_task`: `loss` is not called in a process that got no image of a batch. Draws from torch's
generators are the same in every process, and the same again in a resumed run.

`begin_task` and `end_task` are called in evaluation mode, with gradients enabled. They may fit what needs no images, such as heads on class
statistics, with an optimiser of their own; in the epochs only the trainer steps. A run is tested and saved after `end_task`, so what the
next task shall not start from (heads aligned for the test, say) is put back in the next `begin_task`.
"""

import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.classifier import TaskHeads
from inflora.data.tasks import Task
from inflora.device import to_device
from inflora.parts.dropout import SampleDropout

log = logging.getLogger(__name__)


class Method(nn.Module):
    """Base class of all methods: a backbone, one linear head per task, and hooks that do nothing.

    Attributes:
        backbone: a timm vision transformer without classification head; `backbone(x)` is the class token after the final norm.
        num_pretrained: numbers in the backbone as it came, before a method adds anything to it.
        heads: the classification heads, one per task; `ClassCounts` in their place where something else scores the classes.
        task: the stage being trained; set by the trainer before `begin_task`, and again when a run is resumed inside a stage.
        sample_ids: (b,) positions, within the task's training images, of the batch given to `loss`, on the CPU; set by the trainer.
    """

    stream: ClassVar[Literal["tasks", "joint"]] = "tasks"
    """`"joint"` for a method that needs the data of all tasks at once: the sequence then offers one stage with every class."""

    task: Task

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_pretrained = sum(value.numel() for value in backbone.state_dict().values())
        self.heads = TaskHeads(int(backbone.num_features))  # type: ignore[arg-type]
        self._hits: list[Tensor] = []
        self._answers = 0
        self._told_of_single_class = 0  # heads there were then

    # ---- the contract ----

    def begin_task(self, task: Task) -> None:
        """Prepare for a stage: by default, add its head."""
        self.heads.grow(task.num_classes, self.device)

    def param_groups(self) -> list[dict[str, Any]]:
        """What trains in this stage, as optimiser groups.

        Each group has `params` and `role`: `"branch"` trains at `optimizer.lr`, `"head"` at `optimizer.head_lr`; a group with a rate of its
        own says so by `lr`. An empty list means that nothing trains, and the stage has no epochs.
        """
        raise NotImplementedError

    def loss(self, x: Tensor, y: Tensor) -> Tensor | Iterator[Tensor]:
        """Loss of a batch, averaged over it.

        Args:
            x: (B, 3, H, W) images.
            y: (B,) class labels, numbered in the order the classes are learned.

        Returns:
            A scalar; or a generator of scalars for several optimiser steps on the batch, of which the last is recorded. Terms that do not
            depend on the batch count once, whatever the number of processes.
        """
        raise NotImplementedError

    def end_task(self, task: Task) -> None:
        """Called after the last epoch of a stage."""

    def predict(self, x: Tensor) -> Tensor:
        """Scores of all seen classes, (B, seen classes).

        A score depends on its own image only, never on the rest of the batch; and on the method's state, not on `task`, which is not set
        when a finished run is tested again.
        """
        return self.heads(self.features(x))

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, also the one a resumed run continues with. May freeze parameters with `requires_grad_`."""

    def after_step(self) -> None:
        """Called after each optimiser step."""

    def diagnostics(self) -> dict[str, Any]:
        """Numbers, lists or words about the method's inside after a stage, for the records."""
        return {}

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Everything a later process needs to go on: tensors by name, and what has grown. Nests of dicts, lists, numbers and tensors."""
        return {"tensors": super().state_dict(), "head_sizes": self.heads.sizes, **self.extra_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        """Rebuild whatever had grown, then load all tensors (names and shapes must match exactly)."""
        self.heads.set_sizes(state["head_sizes"], self.device)
        self.load_extra_state(state)
        super().load_state_dict(state["tensors"], strict=True)

    def extra_state(self) -> dict[str, Any]:
        """State of the subclass beyond its parameters and buffers."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Undo `extra_state`; modules that were added since construction must exist with the right shapes when this returns."""

    # ---- what most methods use ----

    @property
    def sample_ids(self) -> Tensor:
        return self._sample_ids

    @sample_ids.setter
    def sample_ids(self, ids: Tensor) -> None:
        self._sample_ids = ids
        dropouts = [module for module in self.modules() if isinstance(module, SampleDropout)]
        if dropouts:
            ids = to_device(ids, self.device)
        for dropout in dropouts:
            dropout.sample_ids = ids

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def num_old_classes(self) -> int:
        """Classes of the stages before the current one."""
        return self.heads.num_classes - self.heads.sizes[-1]

    def features(self, x: Tensor) -> Tensor:
        """Class token after the final norm, (B, embed_dim).

        Of the last block, the backbone then computes little else; `self.backbone.forward_features(x)` has all tokens.
        """
        return self.backbone(x)

    def local_cross_entropy(self, features: Tensor, y: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Cross-entropy over the current stage's classes only, of scores divided by `temperature`: old heads take no part.

        A later stage of a single class uses the softmax over all seen classes (`TaskHeads.local`); the old heads stay frozen.
        """
        if self.heads.current.out_features == 1 and self._told_of_single_class < len(self.heads):
            self._told_of_single_class = len(self.heads)
            what = "is zero" if len(self.heads) == 1 else "is over all seen classes"
            log.info("this task has a single class: the cross-entropy, elsewhere over a task's own classes, %s", what)
        scores, labels = self.heads.local(features, y)
        self.observe(scores, labels)
        return F.cross_entropy(scores / temperature, labels)

    def global_cross_entropy(self, features: Tensor, y: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Cross-entropy over all seen classes, of scores divided by `temperature`."""
        scores = self.heads(features)
        self.observe(scores, y)
        return F.cross_entropy(scores / temperature, y)

    def observe(self, scores: Tensor, y: Tensor) -> None:
        """Count right answers on a training batch, for the progress display: stays on the device, no synchronisation."""
        self._hits.append((scores.detach().argmax(1) == y).sum())
        self._answers += len(y)

    def take_training_hits(self) -> tuple[int, int]:
        """(right answers, answers) observed since the last call."""
        taken = int(torch.stack(self._hits).sum()) if self._hits else 0, self._answers
        self._hits, self._answers = [], 0
        return taken
