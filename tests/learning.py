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
    "sd_lora rr": ["method=sd_lora", "method.rank_reduction={1: 1}"],
    "o_lora l2 normalise": ["method=o_lora", "method.overlap=l2", "method.normalise=true", "method.norm_penalty=0.1"],
    "aper ssf": ["method=aper", "method.variant=ssf"],
    "aper vpt_deep": ["method=aper", "method.variant=vpt_deep"],
    "aper vpt_shallow": ["method=aper", "method.variant=vpt_shallow"],
    "coda_prompt penalty": ["method=coda_prompt", "method.orthogonality=0.1", "method.num_components=2"],
    "derpp full balanced": ["method=derpp", "method.variant=full", "method.selection=balanced", "method.buffer_size=12"],
    "dualprompt original": ["method=dualprompt", "method.variant=original"],
    "er full reservoir": [
        "method=er",
        "method.variant=full",
        "method.selection=reservoir",
        "method.buffer_size=10",
        "method.per_class=null",
        "method.replay_ratio=2",
    ],
    "ewc factors": ["method=ewc", "method.variant=factors"],
    "ewc full batch": ["method=ewc", "method.variant=full", "method.fisher=batch", "method.fisher_images=8"],
    "icarl peft sigmoid": ["method=icarl", "method.variant=peft", "method.loss_form=sigmoid", "method.per_class=2"],
    "fecam diag": ["method=fecam", "method.covariance=diag", "method.tukey=0.5"],
    "fecam shared": ["method=fecam", "method.covariance=shared", "method.alpha2=1"],
    "hide_prompt covariance": ["method=hide_prompt", "method.statistics=covariance", "method.align_epochs=3"],
    "inflora b1": ["method=inflora", "method.blocks=[0]"],
    "inflora_ca fresh norm": ["method=inflora_ca", "alignment.fresh_norm=true", "alignment.covariance=diag"],
    "inflora input PCP": ["method=inflora", "method.energy=input", "method.decomposition=PCP", "method.threshold=0.5"],
    "joint full": ["method=joint", "method.variant=full"],
    "l2p prompt": ["method=l2p", "method.variant=prompt", "method.length=3"],
    "lae adapter": ["method=lae", "method.variant=adapter"],
    "lae prefix": ["method=lae", "method.variant=prefix"],
    "lwf full": ["method=lwf", "method.variant=full", "method.warmup_epochs=1"],
    "sequential aligned": ["method=sequential", "alignment=gaussian", "alignment.restore=true", "alignment.temperature=null"],
    "ranpac none": ["method=ranpac", "method.variant=none"],
    "ranpac ssf": ["method=ranpac", "method.variant=ssf"],
    "sequential inclora": ["method=sequential", "method.variant=inclora"],
    "sequential inclora_frozen": ["method=sequential", "method.variant=inclora_frozen"],
    "sequential_full seen": ["method=sequential_full", "method.softmax=seen"],
}
CASES = {name: [f"method={name}"] for name in METHODS} | VARIANTS

TRAINS = {
    "lora_drs": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "splitlora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "sd_lora rr": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|magnitudes|heads\.heads\.NEW\..*",
    "sd_lora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|magnitudes|heads\.heads\.NEW\..*",
    "o_lora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "aper": "",
    "aper ssf": "",
    "aper vpt_deep": "",
    "aper vpt_shallow": "",
    "c_lora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "cl_lora": r"backbone\.blocks\.0\.attn\.qkv\.lora_B|backbone\.blocks\.1\.attn\.qkv\.(lora_[AB]|scale)|classifier\..*",
    "coda_prompt": r"(components|keys|attentions)\.NEW|heads\.heads\.NEW\..*",
    "coda_prompt penalty": r"(components|keys|attentions)\.NEW|heads\.heads\.NEW\..*",
    "derpp": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "derpp full balanced": r"backbone\..*|heads\..*",
    "dualprompt": r"g_prompt|(e_prompts|keys)\.NEW|heads\.heads\.NEW\..*",
    "dualprompt original": r"g_prompt|(e_prompts|keys)\.NEW|heads\.heads\.NEW\..*",
    "ease": r"backbone\.blocks\.\d\.adapters\.NEW\..*|classifier\..*",
    "er": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "er full reservoir": r"backbone\..*|heads\..*",
    "ewc": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "ewc factors": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "ewc full batch": r"backbone\..*|heads\.heads\.NEW\..*",
    "icarl": r"backbone\..*|heads\..*",
    "icarl peft sigmoid": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "hide_prompt": r"e_prompts\.NEW|task_mlp\..*|(task_)?heads\.heads\.NEW\..*",
    "hide_prompt covariance": r"e_prompts\.NEW|task_mlp\..*|(task_)?heads\.heads\.NEW\..*",
    "inflora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora b1": r"backbone\.blocks\.0\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora input PCP": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "fecam": "",
    "inflora_b5": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora_ca": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "inflora_ca fresh norm": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "joint": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "joint full": r"backbone\..*|heads\..*",
    "lae": r"backbone\.blocks\.0\.attn\.qkv\.(lora_[AB]|scale)|offline\.blocks/0/attn/qkv/\w+|heads\.heads\.NEW\..*",
    "lae adapter": r"backbone\.blocks\.0\.attn\.adapter\..*|offline\.blocks/0/attn/adapter/.*|heads\.heads\.NEW\..*",
    "lae prefix": r"backbone\.blocks\.0\.attn\.(tokens|scale)|offline\.blocks/0/attn/(tokens|scale)|heads\.heads\.NEW\..*",
    "linear_probe": r"heads\.heads\.NEW\..*",
    "l2p": r"pool|keys|heads\.heads\.NEW\..*",
    "l2p prompt": r"pool|keys|heads\.heads\.NEW\..*",
    "lwf": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\..*",
    "lwf full": r"backbone\..*|heads\..*",
    "ranpac": "",
    "ranpac none": "",
    "ranpac ssf": "",
    "sequential": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "sequential aligned": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "sequential inclora": r"backbone\.blocks\.\d\.attn\.qkv\.lora_[AB]|heads\.heads\.NEW\..*",
    "sequential inclora_frozen": r"backbone\.blocks\.\d\.attn\.qkv\.lora_B|heads\.heads\.NEW\..*",
    "sequential_full": r"backbone\..*|heads\.heads\.NEW\..*",
    "slca": r"backbone\..*|heads\.heads\.NEW\..*",
    "sequential_full seen": r"backbone\..*|heads\..*",
    "simplecil": "",
    "mos": r"backbone\.blocks\.\d\.adapters\.NEW\..*|heads\.heads\.NEW\..*",
    "tuna": r"backbone\.blocks\.\d\.adapters\.3\..*|heads\.heads\.NEW\..*",
}
"""What trains, by name; NEW is the newest head."""

GROWING: set[str] = {
    "lora_drs",
    "sd_lora",
    "o_lora",
    "aper",
    "cl_lora",
    "mos",
    "tuna",
    "ease",
    "ranpac",
    "coda_prompt",
    "dualprompt",
    "simplecil",
    "icarl",
    "lwf",
    "fecam",
    "inflora_ca",
    "slca",
    "hide_prompt",
}
"""Methods that keep something for every class or task, and say so in their docstring."""


def build(overrides: list[str], seed: int = 0) -> Method:
    """A method on a toy backbone, with branches of rank 2, and at most one epoch in which only the head trains, where it has such."""
    composed = compose_config(*overrides)
    cfg = composed.method
    if "rank" in cfg:
        cfg.rank = 2
    if "num_projections" in cfg:
        cfg.num_projections = 20
    if "freeze_epochs" in cfg:
        cfg.freeze_epochs = 1
    seed_everything(seed, "method")
    method = instantiate(cfg, toy.toy_vit(seed), _convert_="all")
    if composed.alignment._target_ is not None:
        method = instantiate(composed.alignment, method, _convert_="all")
    return method.eval()


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
            batches = self.task.batches("train", stream="fit", epoch=epoch)
            for step, (x, y) in enumerate(batches):
                self.method.sample_ids = batches.sample_ids(step)
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


def layer_inputs(model: Any, names: list[str], batches: Any) -> dict[str, Tensor]:
    """name -> (tokens, D) float64: everything that comes into these layers."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0])) for name in names
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).flatten(0, 1).double() for name, parts in seen.items()}


def tensors(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict()["tensors"].items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def heads_apart(state: dict[str, Any]) -> Any:
    """A method's state without its heads, which are all that may grow."""
    return {**state, "tensors": {name: value for name, value in state["tensors"].items() if not name.startswith("heads.")}}
