"""HiDe-Prompt: prompts of each task, chosen by a classifier, with statistics of the features with and without them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.classifier import TaskHeads
from inflora.data.tasks import Task, class_to_task
from inflora.parts.centroids import ClassCentroids
from inflora.parts.class_statistics import ClassStatistics
from inflora.parts.collective import num_processes, sum_over_processes
from inflora.parts.contrast import contrastive
from inflora.parts.prompts import PromptMethod, check_at_least, choose_blocks, half_length, uniform_parameter
from inflora.schedule import cosine

STATISTICS = ("centroids", "covariance")


class HidePrompt(PromptMethod):
    """Three problems apart: which task an image is of, its class given the prompts of that task, and the classes of all tasks together.

    A task trains prefixes of its own, which start as those of the task before and keep a little of all older ones (`momentum`); a
    contrastive term keeps its features apart from each other and from those of old classes. Beside them a small classifier on the
    unprompted feature (residual MLP, linear heads) learns the classes; at test the task of its best class decides which prefixes an image
    gets. After each task both classifiers are aligned on features drawn from the statistics of all seen classes.

    Hierarchical Decomposition of Prompt-Based Continual Learning, Wang et al., NeurIPS 2023, arXiv 2310.07234; code thu-ml/HiDe-Prompt.

    Loss: two cross-entropies over the current task's classes, of disjoint parameters, plus `contrast` times the contrastive term.

    Trains: the current prefixes, the MLP, the current head of both classifiers. Stores per task len(blocks) * length * embed_dim floats;
    per class, for both features, 2 * num_centroids * embed_dim (centroids) or (embed_dim + 1) * embed_dim (covariance); the MLP of
    (2 * mlp_ratio * embed_dim + mlp_ratio + 3) * embed_dim, and the second heads.

    Readings: the code trains the classifier of tasks in a run of its own, with other epochs and rates; its parameters are disjoint from the
    rest, so here it trains beside it, in the first `task_epochs` epochs of a task (`trainer.grad_clip` sees the gradients of both together,
    the code each alone). Heads start as torch's linear layers do, in the code with a standard deviation of 0.02 and no bias. The code mixes
    up keys and values of the images of a batch (the reshape of the DualPrompt port); here they stay apart. `length` counts tokens for keys
    and values together (10 for the code's 5). With several processes each contrasts its own images, as in the code, whose eight see 24
    each: `contrast_images` gives that to one process. A centroid of a single image is not drawn from in the alignments, as in the code.

    Args:
        backbone: a timm vision transformer without head.
        blocks: 0-based indices of the prompted blocks; None: the first five twelfths of the depth (0, 1, 2, 3, 4 of 12).
        length: tokens of a prefix, even: half before the keys, half before the values.
        momentum: share of the older tasks' mean prefix in the current one, in [0, 1).
        contrast: weight of the contrastive term.
        contrast_images: images of a group, which are contrasted with each other and with the centroids; None: all of a batch.
        mlp_ratio: width of the MLP, in embed_dim.
        statistics: centroids (as published) or covariance.
        num_centroids: of a class, for centroids.
        task_epochs: epochs of a task in which the classifier of tasks trains; None: all.
        task_lr: its rate there, which follows the schedule; None: optimizer.head_lr.
        align_epochs: of both alignments, at rates that fall to zero on a cosine; each has as many steps as there are old classes.
        align_samples, task_align_samples: features in a step, of the heads and of the classifier of tasks.
        align_lr, task_align_lr: of the heads, and of the classifier of tasks.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        blocks: list[int] | None,
        length: int,
        momentum: float,
        contrast: float,
        contrast_images: int | None,
        mlp_ratio: int,
        statistics: Literal["centroids", "covariance"],
        num_centroids: int,
        task_epochs: int | None,
        task_lr: float | None,
        align_epochs: int,
        align_samples: int,
        task_align_samples: int,
        align_lr: float,
        task_align_lr: float,
    ) -> None:
        check_at_least(
            contrast=(contrast, 0),
            contrast_images=(1 if contrast_images is None else contrast_images, 1),
            mlp_ratio=(mlp_ratio, 1),
            num_centroids=(num_centroids, 1),
            task_epochs=(1 if task_epochs is None else task_epochs, 1),
            task_lr=(0 if task_lr is None else task_lr, 0),
            align_epochs=(align_epochs, 1),
            align_samples=(align_samples, 1),
            task_align_samples=(task_align_samples, 1),
            align_lr=(align_lr, 0),
            task_align_lr=(task_align_lr, 0),
        )
        if not 0 <= momentum < 1:
            raise ValueError(f"method.momentum={momentum} is out of range; choose a number from 0 to below 1")
        if statistics not in STATISTICS:
            raise ValueError(f"method.statistics={statistics} is not known; choose one of {', '.join(STATISTICS)}")
        half = half_length(length, "length")
        super().__init__(backbone, blocks=choose_blocks(backbone, blocks, "method.blocks", (0, 5)))
        self.momentum, self.contrast, self.contrast_images = momentum, contrast, contrast_images
        self.task_epochs, self.task_lr, self.align_epochs = task_epochs, task_lr, align_epochs
        self.align = {"samples": align_samples, "rate": align_lr}
        self.task_align = {"samples": task_align_samples, "rate": task_align_lr}
        embed_dim = self.heads.embed_dim
        self.prompt_shape = (len(self.blocks), 2, half, embed_dim)
        self.e_prompts = nn.ParameterList()
        self.task_mlp = ResidualMlp(embed_dim, mlp_ratio).to(self.device)
        self.task_heads = TaskHeads(embed_dim)
        kind = (lambda: ClassCentroids(embed_dim, num_centroids)) if statistics == "centroids" else (lambda: ClassGaussians(embed_dim))
        self.plain_statistics, self.statistics = kind().to(self.device), kind().to(self.device)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task_heads.grow(task.num_classes, self.device)
        is_first = len(self.e_prompts) == 0
        start = uniform_parameter(self.prompt_shape, -1, 1, self.device) if is_first else self.e_prompts[-1].detach().clone()
        self.e_prompts.append(nn.Parameter(start))

    def begin_epoch(self, epoch: int) -> None:
        self.centers = self.statistics.centers()  # not in every step: to find out how many there are waits for the device
        self.trains_task_classifier = self.task_epochs is None or epoch < self.task_epochs

    def param_groups(self) -> list[dict[str, Any]]:
        own_rate = {} if self.task_lr is None else {"lr": self.task_lr}
        return [
            {"params": [self.e_prompts[-1]], "role": "branch"},
            {"params": [*self.task_mlp.parameters(), *self.task_heads.current.parameters()], "role": "head", **own_rate},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def current_prompt(self) -> Tensor:
        """(blocks, 2, L, embed_dim): the current task's, mixed with the mean of the older ones."""
        *old, own = self.e_prompts
        return torch.lerp(own, torch.stack(old).mean(dim=0), self.momentum) if old else own

    def with_prompt(self, x: Tensor, prompt: Tensor) -> Tensor:
        """(B, embed_dim) features of images that all have the same prefixes."""
        return self.prompted(x, dict(zip(self.blocks, prompt.unsqueeze(1).expand(-1, len(x), -1, -1, -1), strict=True)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.with_prompt(x, self.current_prompt())
        loss = self.local_cross_entropy(features, y)
        if self.trains_task_classifier:
            loss = loss + F.cross_entropy(*self.task_heads.local(self.task_mlp(self.query(x)), y))
        return loss + self.contrast * self.contrastive(features) if self.contrast else loss

    def contrastive(self, features: Tensor) -> Tensor:
        """Mean, over the batch's images, of the contrastive loss of the group that an image is in."""
        groups = features.split(self.contrast_images or len(features))
        return torch.stack([len(group) * contrastive(group, self.centers) for group in groups]).sum() / len(features)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        self.e_prompts[-1].copy_(self.current_prompt())
        self.plain_statistics.add(task, self.query)
        self.statistics.add(task, lambda x: self.with_prompt(x, self.e_prompts[-1]))
        if task.num_old_classes:
            self._align(self.task_scores, [self.task_mlp, self.task_heads], self.plain_statistics, task, **self.task_align)
            self._align(self.heads, [self.heads], self.statistics, task, **self.align)

    def _align(
        self, scores: Callable[[Tensor], Tensor], modules: Sequence[nn.Module], statistics: Any, task: Task, *, samples: int, rate: float
    ) -> None:
        """Train `modules` on features drawn from the statistics, with cross-entropy over all seen classes; the same in every process."""
        parameters = [parameter.requires_grad_() for module in modules for parameter in module.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        labels = statistics.sources()
        with torch.autocast(self.device.type, enabled=False), torch.enable_grad():
            for epoch in range(self.align_epochs):
                optimizer.param_groups[0]["lr"] = rate * cosine(epoch, self.align_epochs)
                # As if equally many were drawn of every Gaussian, shuffled, and the first ones taken.
                order = torch.randperm(samples * len(labels))[: samples * task.num_old_classes]
                for chosen in (order // samples).to(self.device).split(samples):
                    loss = F.cross_entropy(scores(statistics.sample(chosen)), labels[chosen])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        optimizer.zero_grad()
        for parameter in parameters:  # processes on different devices may differ in the last bits
            parameter.data = sum_over_processes(parameter.detach()) / num_processes()

    def task_scores(self, query: Tensor) -> Tensor:
        """(B, seen classes): scores that tell the tasks apart, from features without prompts."""
        return self.task_heads(self.task_mlp(query))

    def prompts(self, query: Tensor) -> Mapping[int, Tensor]:
        task = class_to_task(self.task_heads.sizes, query.device)[self.task_scores(query).argmax(dim=1)]
        return dict(zip(self.blocks, torch.stack(list(self.e_prompts), dim=1)[:, task], strict=True))

    def extra_state(self) -> dict[str, Any]:
        return {"num_prompts": len(self.e_prompts)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.e_prompts = nn.ParameterList(torch.zeros(self.prompt_shape, device=self.device) for _ in range(state["num_prompts"]))
        self.task_heads.set_sizes(state["head_sizes"], self.device)


class ResidualMlp(nn.Module):
    """x -> norm(x + down(gelu(up(x)))), for (B, dim) features."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim), nn.LayerNorm(dim)
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class ClassGaussians(ClassStatistics):
    """One Gaussian with full covariance for every class, with the interface of `ClassCentroids`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, covariance="full")

    def centers(self) -> Tensor:
        """(n, D): means of the classes that had images."""
        return self.means[self.sources()]

    def sources(self) -> Tensor:
        """(n,) the classes that had images."""
        return self.counts.nonzero().flatten()

    def sample(self, chosen: Tensor) -> Tensor:  # type: ignore[override]
        """(m, D) features, one from each of the (m,) classes, numbered as in `sources`."""
        labels = self.sources()[chosen]
        features = self.means.new_empty(len(chosen), self.dim)
        for label in labels.unique().tolist():
            features[labels == label] = super().sample(label, int((labels == label).sum()))
        return features
