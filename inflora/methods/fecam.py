"""FeCAM: feature covariance-aware metric (Goswami et al., NeurIPS 2023, arXiv 2309.14062)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.classifier import ClassCounts
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts.class_statistics import ClassStatistics, cholesky, to_float64


class FeCAM(Method):
    """Frozen backbone; an image belongs to the class whose mean is nearest in the Mahalanobis distance of that class's covariance.

    Features are normalised. A class's covariance is shrunk (a multiple of the mean variance on its diagonal, and of the mean covariance
    off it), because it has more entries than the class has images, and normalised to correlations, so that the distances of different
    classes can be compared. Code: github.com/dipamgoswami/FeCAM, whose scripts for ViTs we follow; its ResNet trainer shrinks twice and
    trains the first task. PILOT's port adds 100 to the variances of features that are not normalised, after training an adapter.

    Trains: nothing. Stores per class embed_dim floats of mean and embed_dim^2 of covariance (diag: embed_dim; shared: embed_dim^2 in all).

    Args:
        backbone: a timm vision transformer without head.
        covariance: "full": each class its own; "diag": each class its own variances, normalised to length 1 as a vector; "shared": pooled
            within all classes (ours: the paper's common covariance is that of each task's features, averaged over tasks).
        alpha1: times the mean variance, added to the variances.
        alpha2: times the mean covariance, added to the covariances.
        normalize: whether covariances become correlations.
        tukey: power of Tukey's transform, before the features are normalised; None: none, as published for ViTs, whose features may be
            negative. Here it is taken of every feature, its sign kept; the published ResNet trainer takes it of the class means, and
            covariances of transformed features before they are normalised.

    A matrix that is not positive definite even so gets a ridge instead of the pseudo-inverse; a class of one image has the unit matrix,
    which without `normalize` makes it the nearest to every image: such classes need two.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        covariance: Literal["full", "shared", "diag"],
        alpha1: float,
        alpha2: float,
        normalize: bool,
        tukey: float | None,
    ) -> None:
        super().__init__(backbone)
        for key, value in (("alpha1", alpha1), ("alpha2", alpha2)):
            if value < 0:
                raise ValueError(f"method.{key}={value} is too small; choose 0 or more")
        if tukey is not None and not 0 < tukey <= 1:
            raise ValueError(f"method.tukey={tukey} is out of range; choose more than 0 and at most 1, or null for no transform")
        self.alpha1, self.alpha2, self.normalize, self.tukey = alpha1, alpha2, normalize, tukey
        self.heads = ClassCounts(self.heads.embed_dim)
        self.statistics = ClassStatistics(self.heads.embed_dim, covariance=covariance)
        self._metrics: list[Tensor] = []

    def param_groups(self) -> list[dict[str, Any]]:
        return []

    def end_task(self, task: Task) -> None:
        self.statistics.add(task, self.directions)
        if self.statistics.kind == "shared":
            self._metrics.clear()

    def directions(self, x: Tensor) -> Tensor:
        """Features of unit length, after Tukey's transform; float32."""
        features = self.features(x).float()
        if self.tukey is not None:
            features = features.sign() * features.abs() ** self.tukey
        return F.normalize(features, dim=1)

    def predict(self, x: Tensor) -> Tensor:
        """Minus the squared distances."""
        directions = self.directions(x)
        with torch.autocast(self.device.type, enabled=False):
            pairs = zip(self.statistics.means, self.metrics(), strict=True)
            distances = [self._distances(directions - mean, metric) for mean, metric in pairs]
        return -torch.stack(distances, dim=1).masked_fill(self.statistics.counts == 0, torch.inf)

    def _distances(self, differences: Tensor, metric: Tensor) -> Tensor:
        whitened = differences * metric if self.statistics.kind == "diag" else differences @ metric.mT
        return whitened.square().sum(1)

    def metrics(self) -> list[Tensor]:
        """Per class, A with A^T A the inverse of the shrunk and normalised covariance: (D, D), or the (D,) diagonal for diag. Kept."""
        if self.statistics.kind == "shared":
            self._metrics = self._metrics[:1] or [self._metric(self.statistics.covariances)]
            return self._metrics * len(self.statistics)
        for label in range(len(self._metrics), len(self.statistics)):
            self._metrics.append(self._metric(self.statistics.covariance(label)))
        return self._metrics

    def _metric(self, covariance: Tensor) -> Tensor:
        exact = to_float64(covariance)
        is_diagonal = exact.dim() == 1
        unit = torch.ones_like(exact) if is_diagonal else torch.eye(len(exact)).to(exact)
        exact = shrunk(exact if exact.any() else unit, self.alpha1, self.alpha2)
        if is_diagonal:
            return ((exact / exact.norm() if self.normalize else exact).clamp(min=1e-12) ** -0.5).to(covariance)
        exact = correlations(exact) if self.normalize else exact
        factor, failed = torch.linalg.cholesky_ex(exact)
        return torch.linalg.solve_triangular(cholesky(exact) if failed else factor, unit, upper=False).to(covariance)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._metrics.clear()


def shrunk(covariance: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """Plus alpha1 times the mean variance on the diagonal, and alpha2 times the mean covariance off it.

    Args:
        covariance: (D, D), or the (D,) variances of a diagonal one.
        alpha1, alpha2: 0 or more.
    """
    if covariance.dim() == 1:
        return covariance + alpha1 * covariance.mean()
    variances = covariance.diagonal()
    off = covariance - variances.diag()
    mean_off = off.sum() / (off != 0).sum().clamp(min=1)  # exact zeros do not count, as in the authors' code
    return covariance + alpha2 * mean_off + (alpha1 * variances.mean() - alpha2 * mean_off) * torch.eye(len(off)).to(off)


def correlations(covariance: Tensor) -> Tensor:
    """(D, D) covariance divided by the product of the standard deviations; a feature that never varies correlates with none."""
    deviations = covariance.diagonal().clamp(min=0).sqrt().clamp(min=1e-12)
    return (covariance / torch.outer(deviations, deviations)).fill_diagonal_(1)
