"""Classifier alignment: after each task but the first, all heads are trained on features drawn from the classes' Gaussians.

For any method whose scores are `heads(features(x))`: `python train.py method=... alignment=gaussian`. Source: Zhang et al. 2023 (SLCA,
ICCV, arXiv 2303.05118) and its code, which InfLoRA+CA took over. Departures: real task sizes instead of equal ones; statistics in float64.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.classifier import TaskHeads
from inflora.data.tasks import Task
from inflora.device import to_device
from inflora.method import Method
from inflora.parts.class_statistics import ClassStatistics, GrowingBuffers
from inflora.parts.collective import num_processes, sum_over_processes
from inflora.schedule import cosine

log = logging.getLogger(__name__)


class ClassifierAlignment(GrowingBuffers):
    """Class statistics, and the training of heads on samples from them; see `gaussian` for the arguments.

    Attributes:
        statistics: of every seen class, taken when its task had been learned and never again.
        own_weight, own_bias: (C, D) and (C,): with `restore`, the heads as their tasks left them, while aligned ones are in their place.
        losses: mean loss of each epoch of the last alignment.
    """

    own_weight: Tensor
    own_bias: Tensor

    def __init__(
        self,
        dim: int,
        *,
        epochs: int,
        samples_per_class: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        temperature: float | None,
        mean_scale: float,
        covariance: Literal["full", "shared", "diag"],
        restore: bool,
        key: str = "alignment",
    ) -> None:
        super().__init__()
        for name, value in (("epochs", epochs), ("samples_per_class", samples_per_class)):
            if value < 1:
                raise ValueError(f"{key}.{name}={value} is too small; choose 1 or more")
        for name, value in (("lr", lr), ("temperature", temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"{key}.{name}={value} is too small; choose more than 0")
        for name, value in (("momentum", momentum), ("mean_scale", mean_scale)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}.{name}={value} is out of range; choose a number from 0 to 1")
        if weight_decay < 0:
            raise ValueError(f"{key}.weight_decay={weight_decay} is too small; choose 0 or more")
        self.statistics = ClassStatistics(dim, covariance=covariance, key=f"{key}.covariance")
        self.epochs, self.samples_per_class = epochs, samples_per_class
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.temperature, self.mean_scale, self.restore = temperature, mean_scale, restore
        self.register_buffer("own_weight", torch.zeros(0, dim))
        self.register_buffer("own_bias", torch.zeros(0))
        self.losses: list[float] = []

    @torch.no_grad()
    def align(self, heads: TaskHeads) -> None:
        """Train all heads on samples, in place; the same in every process. With `restore`, keep what they were."""
        weight, bias = (torch.cat([getattr(head, name) for head in heads.heads]) for name in ("weight", "bias"))
        if self.restore:
            self.own_weight, self.own_bias = weight.clone(), bias.clone()
        set_heads(heads, *self.fit([weight, bias], lambda features: F.linear(features, weight, bias), heads.sizes))

    def fit(self, parameters: Sequence[Tensor], score: Callable[[Tensor], Tensor], sizes: list[int]) -> list[Tensor]:
        """Train a classifier of any kind on samples; the same in every process.

        Args:
            parameters: of the classifier: leaf tensors of its own, which change.
            score: (n, D) features -> (n, C) scores, from these parameters.
            sizes: classes per task.

        Returns:
            The trained parameters, detached.
        """
        with torch.autocast(parameters[0].device.type, enabled=False), torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_()
            self._fit(parameters, score, sizes)
        log.info("aligned %d heads on samples of %d classes: loss %.3f to %.3f", len(sizes), sum(sizes), self.losses[0], self.losses[-1])
        # Processes on different devices may differ in the last bits.
        return [sum_over_processes(parameter.detach()) / num_processes() for parameter in parameters]

    def _fit(self, parameters: Sequence[Tensor], score: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        optimizer = torch.optim.SGD(list(parameters), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        epoch_losses = []
        for epoch in range(self.epochs):
            optimizer.param_groups[0]["lr"] = self.lr * cosine(epoch, self.epochs)
            features, labels = self.samples(sizes)
            losses = []
            for chosen in to_device(torch.randperm(len(labels)), labels.device).split(self.samples_per_class):
                scores = score(features[chosen])
                if self.temperature is not None:
                    scores = normalized(scores, sizes) / self.temperature
                loss = F.cross_entropy(scores, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            epoch_losses.append(torch.stack(losses).mean())
        self.losses = torch.stack(epoch_losses).tolist()

    def samples(self, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """(n, D) features and their (n,) labels, `samples_per_class` of every class that had images, class after class.

        Args:
            sizes: classes per task.
        """
        labels = self.statistics.counts.nonzero().flatten()
        scales = mean_scales(sizes, self.mean_scale)
        drawn = [self.statistics.sample(label, self.samples_per_class, scale=scales[label]) for label in labels.tolist()]
        return torch.cat(drawn), labels.repeat_interleave(self.samples_per_class)

    def put_back(self, heads: TaskHeads) -> None:
        """With `restore`: the heads as their tasks left them, bit for bit."""
        if len(self.own_bias):
            set_heads(heads, self.own_weight, self.own_bias)
            self.own_weight, self.own_bias = self.own_weight[:0].clone(), self.own_bias[:0].clone()


class Aligned(Method):
    """What `gaussian` mixes into a method's class: its heads are aligned after every task but the first."""

    alignment: ClassifierAlignment

    def begin_task(self, task: Task) -> None:
        self.alignment.put_back(self.heads)
        super().begin_task(task)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.alignment.statistics.add(task, self.features)
        if len(self.heads) > 1:
            self.alignment.align(self.heads)

    def diagnostics(self) -> dict[str, Any]:
        return {**super().diagnostics(), "alignment_losses": self.alignment.losses}


def gaussian(
    method: Method,
    *,
    epochs: int,
    samples_per_class: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    temperature: float | None,
    mean_scale: float,
    covariance: Literal["full", "shared", "diag"],
    restore: bool,
    fresh_norm: bool,
) -> Method:
    """Let the heads of `method` be aligned after every task but the first, in place: the instance's class becomes one mixed from `Aligned`.

    Stores per seen class embed_dim^2 (full) or embed_dim (diag) floats of covariance (shared: embed_dim^2 in all) and embed_dim of mean,
    from features under the network as it was right after the class's task; with `restore`, a copy of the heads.

    Args:
        method: any whose scores are `heads(features(x))`.
        epochs: of the alignment, at a rate that falls to zero on a cosine.
        samples_per_class: drawn afresh in each epoch; a step takes as many, of all classes mixed.
        lr, momentum, weight_decay: of stochastic gradient descent on all heads.
        temperature: scores are divided by it and by the mean norm of the tasks' scores (`normalized`); null: plain cross-entropy.
        mean_scale: the means of old classes are shrunk towards this (`mean_scales`).
        covariance: full, shared or diag; see `ClassStatistics`.
        restore: put the un-aligned heads back before the next task: SLCA; False: go on from the aligned ones: InfLoRA+CA.
        fresh_norm: put a fresh norm (weight 1, bias 0, epsilon 1e-5) in the place of the backbone's final one: the code of SLCA, and of
            InfLoRA+CA on CIFAR-100.

    Raises:
        ValueError: if an argument is out of range, or the method has no linear heads, or only one stage.
    """
    kind = type(method)
    name = kind.__name__
    if kind.predict is not Method.predict or type(method.heads) is not TaskHeads:
        raise ValueError(f"alignment=gaussian trains linear heads, and {name} has other scores; choose alignment=none, or another method")
    if method.stream == "joint":
        raise ValueError(f"alignment=gaussian has nothing to align in {name}, which learns all classes at once; choose alignment=none")
    alignment = ClassifierAlignment(
        method.heads.embed_dim,
        epochs=epochs,
        samples_per_class=samples_per_class,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        temperature=temperature,
        mean_scale=mean_scale,
        covariance=covariance,
        restore=restore,
    )
    if fresh_norm:
        reset_norm(method.backbone)
    method.__class__ = type(f"Aligned{name}", (Aligned, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    aligned = cast(Aligned, method)
    aligned.alignment = alignment.to(method.device)
    return aligned


def reset_norm(backbone: nn.Module) -> None:
    """Put a fresh `nn.LayerNorm` in the place of a timm ViT's final norm."""
    norm = backbone.norm
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(
            f"alignment.fresh_norm=true replaces a LayerNorm, but this backbone ends with {type(norm).__name__}; set it to false"
        )
    backbone.norm = nn.LayerNorm(list(norm.normalized_shape)).to(norm.weight.device)


def normalized(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C) scores divided by the mean over tasks of the 2-norm of the task's scores; differentiable in both.

    Args:
        sizes: classes per task.
    """
    norms = [part.norm(dim=1, keepdim=True) + 1e-7 for part in scores.split(list(sizes), dim=1)]
    return scores / torch.cat(norms, dim=1).mean(dim=1, keepdim=True)


def mean_scales(sizes: Sequence[int], oldest: float) -> list[float]:
    """The factor on each class's mean: 1 for the newest task's, and linearly less for older ones, towards `oldest`."""
    return [oldest + (1 - oldest) * (task + 1) / len(sizes) for task, size in enumerate(sizes) for _ in range(size)]


@torch.no_grad()
def set_heads(heads: TaskHeads, weight: Tensor, bias: Tensor) -> None:
    """Fill all heads from (C, D) and (C,)."""
    for head, own_weight, own_bias in zip(heads.heads, weight.split(heads.sizes), bias.split(heads.sizes), strict=True):
        cast(nn.Linear, head).weight.copy_(own_weight)
        cast(nn.Linear, head).bias.copy_(own_bias)
