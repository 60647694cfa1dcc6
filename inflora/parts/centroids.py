"""Several centroids for every seen class, with the variances around each: a smaller account of its features than a covariance."""

from collections.abc import Callable

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from inflora.data.tasks import Task
from inflora.device import to_device
from inflora.parts.class_statistics import RIDGE, GrowingBuffers, task_features
from inflora.parts.collective import gather_over_processes


class ClassCentroids(GrowingBuffers):
    """k-means of every class's features, taken once, when its task has been learned; each centroid stands for a diagonal Gaussian.

    Put it in a method as a submodule: its buffers are then saved, loaded and moved with the method. Stores 2 * count * embed_dim floats per
    class.

    Attributes:
        sizes: (C, count) images of each centroid; 0 where a class has fewer different images than centroids.
        means, variances: (C, count, D).

    Args:
        dim: D, the length of a feature.
        count: centroids of a class.
    """

    sizes: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.dim, self.count = dim, count
        self.register_buffer("sizes", torch.zeros(0, count, dtype=torch.long))
        self.register_buffer("means", torch.zeros(0, count, dim))
        self.register_buffer("variances", torch.zeros(0, count, dim))

    def __len__(self) -> int:
        """Classes seen."""
        return len(self.sizes)

    @torch.no_grad()
    def add(self, task: Task, features: Callable[[Tensor], Tensor]) -> None:
        """Take in the classes of `task`, from all its training images as test images are prepared; over all processes.

        Args:
            features: (B, 3, H, W) images -> (B, D).
        """
        assert len(self) == task.num_old_classes, "every task once, in order"
        found = list(task_features(task, features))
        own = torch.cat([self.means.new_zeros(0, self.dim), *(batch for batch, _ in found)])
        labels = torch.cat([self.sizes.new_zeros(0), *(batch for _, batch in found)])
        everything, labels = gather_over_processes(own).cpu().double(), gather_over_processes(labels).cpu()
        order = everything[:, 0].argsort(stable=True)  # independent of the number of processes; a norm makes the sum 0 up to rounding
        everything, labels = everything[order], labels[order]
        for label in range(len(self), len(self) + task.num_classes):
            self._append(everything[labels == label])

    def _append(self, features: Tensor) -> None:
        """Take in the next class, from its (n, D) features; n may be 0."""
        sizes, means = torch.zeros(1, self.count), torch.zeros(1, self.count, self.dim, dtype=torch.float64)
        variances = torch.zeros_like(means)
        count = min(self.count, len(features.unique(dim=0)))
        if count:
            kmeans = KMeans(count, n_init=10, random_state=int(torch.randint(2**31, ())))  # type: ignore[arg-type]
            assigned = torch.from_numpy(kmeans.fit_predict(features.numpy()))
            for centroid in range(count):
                members = features[assigned == centroid]
                sizes[0, centroid] = len(members)
                means[0, centroid], variances[0, centroid] = members.mean(0), members.var(0, correction=0)
        self.sizes = torch.cat([self.sizes, sizes.to(self.sizes)])
        self.means = torch.cat([self.means, means.to(self.means)])
        self.variances = torch.cat([self.variances, variances.to(self.variances)])

    def centers(self) -> Tensor:
        """(n, D): every centroid there is."""
        return self.means[self.sizes > 0]

    def _is_drawn(self) -> Tensor:
        """(C, count): what `sample` draws from. A centroid of one image has no spread and is left out, unless its class has no other."""
        is_there = self.sizes > 0
        has_spread = self.variances.any(dim=2) & is_there
        return torch.where(has_spread.any(dim=1, keepdim=True), has_spread, is_there)

    def sources(self) -> Tensor:
        """(n,) class of every Gaussian that `sample` draws from."""
        return self._is_drawn().nonzero()[:, 0]

    def sample(self, chosen: Tensor) -> Tensor:
        """(m, D) features, one from each of the (m,) Gaussians, numbered as in `sources`; the same on all devices and in all processes."""
        noise = to_device(torch.randn(len(chosen), self.dim), self.means.device).to(self.means)
        labels, centroids = self._is_drawn().nonzero()[chosen].unbind(1)
        return self.means[labels, centroids] + noise * (self.variances[labels, centroids] + RIDGE).sqrt()
