"""Class means as classifiers: means of features, cosine scores, and the cosine classifier that a backbone is tuned with."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.parts.class_statistics import GrowingBuffers
from inflora.parts.collective import sum_over_processes


@torch.no_grad()
def class_means(features: Callable[[Tensor], Tensor], task: Task, width: int, device: torch.device) -> Tensor:
    """Mean features of each class of a task, over all its training images, prepared as for the test; in every process the same.

    Args:
        features: (b, 3, H, W) images -> (b, width).
        width: numbers per image.
        device: where the images are.

    Returns:
        (task.num_classes, width), float64 (on the CPU where the device has none). A class without images gets zeros.
    """
    sums = torch.zeros(task.num_classes, width, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    for x, y in task.batches("test", stream="prototypes"):
        if len(x):
            members = F.one_hot(y - task.num_old_classes, task.num_classes)
            sums += members.to(sums).mT @ features(x).to(sums)
    counts = (task.train_labels - task.num_old_classes).bincount(minlength=task.num_classes)
    return sum_over_processes(sums) / counts.clamp(min=1).to(sums).unsqueeze(1)


def cosine(features: Tensor, directions: Tensor) -> Tensor:
    """(B, C) cosines of (B, width) features with (C, width) directions, in float32 whatever the precision around. Zero for zeros."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=1) @ F.normalize(directions.float(), dim=1).mT


class Prototypes(GrowingBuffers):
    """One mean feature per class, in learning order; once added, a mean never changes.

    Attributes:
        means: (classes, width), not normalised.
    """

    means: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, width))

    def add(self, means: Tensor) -> None:
        """Append (classes, width) means of new classes."""
        self.means = torch.cat([self.means, means.to(self.means)])

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, classes) cosines."""
        return cosine(features, self.means)


class CosineClassifier(nn.Module):
    """scale * cosine(feature, weight of the class): its weights start uniform, its scale at 1, and all of them train.

    Args:
        width: of the features.
        num_classes: rows of the weight.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, num_classes)."""
        return self.scale * cosine(features, self.weight)
