"""What every method's tests share: methods built on a toy backbone and taken through tiny tasks, and the facts each is held to."""

from collections.abc import Callable
from typing import Any

import torch
import toy
from helpers import METHODS, compose_config
from hydra.utils import instantiate
from torch import Tensor

from inflora.data.tasks import Task, TaskSequence
from inflora.method import Method
from inflora.seeding import seed_everything
from inflora.trainer import trainable_groups

VARIANTS = {
    "inflora b1": ["method=inflora", "method.blocks=[0]"],
    "inflora input PCP": ["method=inflora", "method.energy=input", "method.decomposition=PCP", "method.threshold=0.5"],
    "joint full": ["method=joint", "method.variant=full"],
    "sequential inclora": ["method=sequential", "method.variant=inclora"],
    "sequential inclora_frozen": ["method=sequential", "method.variant=inclora_frozen"],
    "sequential_full seen": ["method=sequential_full", "method.softmax=seen"],
}
CASES = {name: [f"method={name}"] for name in METHODS} | VARIANTS

TRAINS = {
    "inflora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora b1": r"backbone\.blocks\.0\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora input PCP": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "joint": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "joint full": r"backbone\..*|heads\..*",
    "linear_probe": r"heads\.heads\.NEW\..*",
    "sequential": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "sequential inclora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "sequential inclora_frozen": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "sequential_full": r"backbone\..*|heads\.heads\.NEW\..*",
    "sequential_full seen": r"backbone\..*|heads\..*",
}
"""What trains, by name; NEW is the newest head."""

GROWING: set[str] = set()
"""Methods that keep something for every class or task, and say so in their docstring."""


def build(overrides: list[str], seed: int = 0) -> Method:
    """A method on a toy backbone, with branches of rank 2 where it has some."""
    cfg = compose_config(*overrides).method
    if "rank" in cfg:
        cfg.rank = 2
    seed_everything(seed, "method")
    return instantiate(cfg, toy.toy_vit(seed), _convert_="all").eval()


class Fit:
    """Takes a method through one stage, as the trainer does, and stops where a test wants to look."""

    def __init__(self, method: Method, task: Task) -> None:
        self.method, self.task = method, task
        method.task = task

    def begin(self) -> "Fit":
        seed_everything(0, "begin", self.task.index)
        self.method.begin_task(self.task)
        return self

    def train(self, epochs: int = 1, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, lr: float = 1e-2) -> "Fit":
        groups = trainable_groups(self.method, {"branch": lr, "head": lr})
        if not groups:
            return self
        steps = optimizer(groups)
        for epoch in range(epochs):
            seed_everything(0, "fit", self.task.index, epoch)
            self.method.train()
            self.method.begin_epoch(epoch)
            for x, y in self.task.batches("train", stream="fit", epoch=epoch):
                found = self.method.loss(x, y)
                for loss in [found] if isinstance(found, Tensor) else found:
                    steps.zero_grad()
                    if loss.requires_grad:
                        loss.backward()
                    steps.step()
                    self.method.after_step()
        return self

    def end(self) -> "Fit":
        seed_everything(0, "end", self.task.index)
        self.method.eval()
        self.method.end_task(self.task)
        return self


def learn(method: Method, tasks: Any, epochs: int = 1) -> Method:
    for task in tasks:
        Fit(method, task).begin().train(epochs).end()
    return method


def sequence_for(method: Method, *args: Any, **kwargs: Any) -> TaskSequence:
    return toy.sequence(*args, stream=method.stream, **kwargs)


def test_images(tasks: TaskSequence) -> Tensor:
    return torch.cat([x for task in tasks.tasks for x, _ in task.test_batches()])


test_images.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name


def scores(method: Method, x: Tensor) -> Tensor:
    method.eval()
    with torch.no_grad():
        return method.predict(x)


def tensors(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict()["tensors"].items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def heads_apart(state: dict[str, Any]) -> Any:
    """A method's state without its heads, which are all that may grow."""
    return {**state, "tensors": {name: value for name, value in state["tensors"].items() if not name.startswith("heads.")}}
