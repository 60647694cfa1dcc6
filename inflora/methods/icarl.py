"""iCaRL: incremental classifier and representation learning (Rebuffi et al., CVPR 2017, arXiv 1611.07725)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.data.tasks import Task
from inflora.device import to_device
from inflora.parts.collective import gather_over_processes
from inflora.parts.distillation import DistilledMethod, distillation
from inflora.parts.replay import ReplayBuffer, gather_ids

CHUNK = 256
"""Exemplars per forward pass when their means are taken."""


class ICaRL(DistilledMethod):
    """Every class keeps the exemplars whose mean feature is closest to the class's; images are classified by the nearest of these means.

    Training runs over the new images and the exemplars, with a loss on the labels and distillation from the model as the last task left
    it. Afterwards each new class's exemplars are picked one by one (`herd`), the old classes' lists are cut to the new quota, and the
    means of all classes are taken anew; features have length 1. Keeps raw training images: not comparable with methods that keep none.

    Loss: "softmax": cross-entropy over all seen classes + distillation with temperature over the old ones, which is PILOT
    (models/icarl.py), a ViT; "sigmoid": the paper's, a binary cross-entropy per class, summed over the seen classes, whose targets are
    the labels for the new classes and the old model's sigmoids for the old ones; mammoth (models/icarl.py) averages over all classes.

    The authors' code is for Theano (github.com/srebuffi/iCaRL); what is compared with today are these re-implementations.

    Trains: every weight (`variant=full`, as published) or one branch on keys and values (`variant=peft`, ours), and all heads. Stores
    between tasks: the trained numbers twice, the exemplars, H * W * 3 bytes each, and embed_dim floats of mean per class.

    Readings: an exemplar is seen once per epoch, as in the published codes, but joins a random new image instead of shuffling in: an
    epoch has as many steps as without exemplars. Means are of the exemplars alone, without their mirror images (mammoth adds those).
    Heads start as torch's linear layers do (PILOT's weights are drawn from a range sqrt(3) times as wide, its biases are 0).
    Scores are minus the squared distance to the mean; the heads only train the features.

    Args:
        backbone, variant, rank, blocks: see `TunedMethod`.
        buffer_size, per_class: see `ReplayBuffer`.
        loss_form: "softmax" or "sigmoid".
        distillation_weight: of the distillation under "softmax".
        temperature: of the distillation under "softmax".

    Raises:
        ValueError: if an argument is out of range.
    """

    class_means: Tensor

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["peft", "full"],
        rank: int,
        blocks: list[int] | None,
        buffer_size: int | None,
        per_class: int | None,
        loss_form: Literal["softmax", "sigmoid"],
        distillation_weight: float,
        temperature: float,
    ) -> None:
        super().__init__(
            backbone, variant=variant, rank=rank, blocks=blocks, distillation_weight=distillation_weight, temperature=temperature
        )
        if loss_form not in ("softmax", "sigmoid"):
            raise ValueError(f"method.loss_form={loss_form} is not known; choose softmax or sigmoid")
        self.loss_form = loss_form
        self.buffer = ReplayBuffer(selection="balanced", buffer_size=buffer_size, per_class=per_class)
        self.register_buffer("class_means", torch.zeros(0, self.heads.embed_dim))

    # ---- training ----

    def begin_epoch(self, epoch: int) -> None:
        """Give each exemplar a new image to train beside, another one in every epoch."""
        hosts = torch.randperm(self.task.num_train)
        self.hosts = hosts[torch.arange(len(self.buffer)) % len(hosts)]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        images, labels = x, y
        augment_key = int(torch.randint(2**62, ()))
        rows = torch.isin(self.hosts, self.sample_ids).nonzero().squeeze(1)
        if len(rows):
            images = torch.cat([x, self.buffer.prepare(self.task, rows, key=augment_key, ids=rows)])
            labels = torch.cat([y, to_device(self.buffer.labels[rows], y.device)])
        scores = self.heads(self.features(images))
        self.observe(scores[: len(y)], y)
        old_scores = self.old_scores(images) if self.has_teacher else None
        # A batch brings more exemplars or fewer, and processes differ in that: divided by the share that is expected of it.
        return self.losses(scores, labels, old_scores).sum() / (len(y) * (1 + len(self.buffer) / self.task.num_train))

    def losses(self, scores: Tensor, y: Tensor, old_scores: Tensor | None) -> Tensor:
        """(B,) losses of images with `scores` (B, C) and, after the first task, the old model's (B, old classes)."""
        if self.loss_form == "sigmoid":
            targets = F.one_hot(y, scores.shape[1]).float()
            if old_scores is not None:
                targets[:, : old_scores.shape[1]] = old_scores.float().sigmoid()
            return F.binary_cross_entropy_with_logits(scores.float(), targets, reduction="none").sum(1)
        losses = F.cross_entropy(scores, y, reduction="none")
        if old_scores is None:
            return losses
        return losses + self.distillation_weight * distillation(scores[:, : old_scores.shape[1]], old_scores, self.temperature)

    # ---- exemplars ----

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self._choose_exemplars(task)
            self._take_means(task)
        super().end_task(task)

    def _choose_exemplars(self, task: Task) -> None:
        num_classes = self.heads.num_classes
        positions, features = self._features_of(task)
        labels = task.train_labels[positions]
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero().squeeze(1)
            chosen = rows[herd(features[rows], self.buffer.quota(num_classes))]
            self.buffer.offer(task, positions[chosen], num_classes=num_classes, priorities=torch.arange(len(chosen)))

    def _features_of(self, task: Task) -> tuple[Tensor, Tensor]:
        """Positions (n,) and features (n, embed_dim) of all training images, as test images are prepared; the same in every process."""
        batches = task.batches("test", stream="herding")
        positions, features = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, self.heads.embed_dim, device=self.device)]
        for step, (x, _) in enumerate(batches):
            if len(x):
                positions.append(batches.sample_ids(step))
                features.append(self.unit_features(x))
        found, order = gather_ids(torch.cat(positions), self.device).sort()
        return found, gather_over_processes(torch.cat(features)).cpu()[order]

    def _take_means(self, task: Task) -> None:
        sums = torch.zeros(self.heads.num_classes, self.heads.embed_dim, device=self.device)
        for rows in torch.arange(len(self.buffer)).split(CHUNK):
            sums.index_add_(0, self.buffer.labels[rows].to(self.device), self.unit_features(self.buffer.prepare(task, rows)))
        self.class_means = F.normalize(sums)

    def unit_features(self, x: Tensor) -> Tensor:
        """Features of length 1, (B, embed_dim)."""
        return F.normalize(self.features(x).float())

    def predict(self, x: Tensor) -> Tensor:
        features = self.unit_features(x)
        with torch.autocast(self.device.type, enabled=False):
            return 2 * features @ self.class_means.T - 2  # minus the squared distance, as both have length 1

    # ---- state ----

    def diagnostics(self) -> dict[str, Any]:
        return {"buffer_images": len(self.buffer), "buffer_megabytes": self.buffer.num_bytes / 1e6}

    def extra_state(self) -> dict[str, Any]:
        return {
            "buffer": self.buffer.state_dict(),
            "num_means": len(self.class_means),
            **super().extra_state(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.class_means = torch.zeros(state["num_means"], self.heads.embed_dim, device=self.device)
        super().load_extra_state(state)


def herd(features: Tensor, count: int) -> Tensor:
    """Pick rows one by one, each time the one that brings the mean of the picked closest to the mean of all.

    Args:
        features: (n, d).
        count: how many; all n if there are fewer.

    Returns:
        (min(count, n),) row numbers, in the order they were picked.

    Source: Rebuffi et al. 2017, algorithm 4.
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros(features.shape[1], dtype=torch.float64)
    picked: list[int] = []
    for k in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / k).square().sum(1)
        distance[picked] = torch.inf
        picked.append(int(distance.argmin()))
        total += features[picked[-1]]
    return torch.tensor(picked, dtype=torch.int64)
