"""RanPAC: random projections and a ridge classifier (McDonnell et al., NeurIPS 2023, arXiv 2307.02251)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.data.tasks import Task
from inflora.parts.class_statistics import GrowingBuffers, check_finite
from inflora.parts.collective import sum_over_processes
from inflora.parts.first_task import VARIANTS, FirstTaskMethod

RIDGES = [10.0**exponent for exponent in range(-8, 9)]
"""The choices for lambda, as published."""


class RanPAC(FirstTaskMethod):
    """Adapts to the first task as `aper` does, then fits a linear classifier on randomly projected features in closed form.

    With h = relu(feature @ R), R fixed and standard normal, every task adds to the sums G of h h^T and Q of h y^T (y one-hot), and
    W = (G + lambda I)^-1 Q is solved anew: a ridge regression on all images ever seen. A score is h W, without normalisation or bias.
    lambda is the one of 10^-8 ... 10^8 that, fitted on 80 percent of the current task's images, has the least squared error on the others.
    A class's only image is always among the fitted ones (theirs: by chance); where no image is left to choose by, lambda stays.

    Official code: github.com/RanPAC/RanPAC. Loss: cross-entropy over the classes of the first task, then squared error. LAMDA-PILOT scores
    with cosines instead, which is not the ridge solution. Departures: sums, storage and solves in float64 (theirs: float32), and a lambda
    that rounding would drown (`solve`) is no candidate, or raised tenfold until it is above.

    Trains on the first task only, as `aper`; variant "none" not even there. Stores, with M = num_projections, embed_dim * M floats of R,
    M^2 of G and 2 * M per class: at M = 10,000 G has 800 MB, in main memory. A task costs 18 Cholesky decompositions of M^3 / 3 operations.

    Args:
        num_projections: M; 0: the features themselves are h, without R and relu.
        The others are those of `FirstTaskMethod`.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["adapter", "ssf", "vpt_shallow", "vpt_deep", "none"],
        bottleneck: int,
        adapter_scale: float,
        dropout: float,
        num_tokens: int,
        num_projections: int,
    ) -> None:
        super().__init__(
            backbone,
            variant=variant,
            bottleneck=bottleneck,
            adapter_scale=adapter_scale,
            dropout=dropout,
            num_tokens=num_tokens,
            variants=(*VARIANTS, "none"),
        )
        if num_projections < 0:
            raise ValueError(f"method.num_projections={num_projections} is negative; choose 1 or more, or 0 for the features themselves")
        # From a generator of its own, seeded by the first draw after the module's: R depends on the run's seed and on nothing later.
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.register_buffer("projection", torch.randn(self.heads.embed_dim, num_projections, generator=draw))
        self.ridge = Ridge(num_projections or self.heads.embed_dim)

    projection: Tensor

    def projected(self, x: Tensor) -> Tensor:
        """h of images: (B, M), float32."""
        features = self.features(x)
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() @ self.projection).relu() if self.projection.numel() else features.float()

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        is_held_out = torch.zeros(task.num_train, dtype=torch.bool)
        is_held_out[torch.randperm(task.num_train)[int(0.8 * task.num_train) :]] = True  # the same in every process
        # No image that stands alone for its class: what the fit has never seen is best predicted as zero, so the largest lambda would win.
        is_fitted = task.train_labels[~is_held_out].bincount(minlength=task.num_old_classes + task.num_classes) > 0
        is_held_out &= is_fitted[task.train_labels]
        batches = task.batches("test", stream="ridge")
        kept, others = RidgeSums(self.ridge.width, task.num_classes, self.device), []
        for step, (x, y) in enumerate(batches):
            if len(x):
                h, targets = self.projected(x), F.one_hot(y - task.num_old_classes, task.num_classes)
                held_out = is_held_out[batches.sample_ids(step)].to(h.device)
                kept.add(h[~held_out], targets[~held_out])
                others.append((h[held_out], targets[held_out]))
        kept.sum_over_processes()
        if is_held_out.any():
            self.ridge.choose(kept, others)
        rest = RidgeSums(self.ridge.width, task.num_classes, self.device)
        for h, targets in others:
            rest.add(h, targets)
        rest.sum_over_processes()
        self.ridge.update(kept.gram + rest.gram, kept.correlations + rest.correlations)

    def predict(self, x: Tensor) -> Tensor:
        return self.ridge(self.projected(x))

    def extra_state(self) -> dict[str, Any]:
        memory = {"gram": self.ridge.gram, "correlations": self.ridge.correlations, "strength": self.ridge.strength}
        return {**super().extra_state(), "memory": memory}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        memory = state["memory"]
        self.ridge.gram, self.ridge.correlations, self.ridge.strength = memory["gram"], memory["correlations"], memory["strength"]

    def diagnostics(self) -> dict[str, Any]:
        """The lambda of the latest solution."""
        return {"ridge": self.ridge.strength}


class RidgeSums:
    """Sums of h h^T and h y^T over images, in float64 (on the CPU where the device has none)."""

    def __init__(self, width: int, num_classes: int, device: torch.device) -> None:
        where: dict[str, Any] = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
        self.gram = torch.zeros(width, width, **where)
        self.correlations = torch.zeros(width, num_classes, **where)

    def add(self, h: Tensor, targets: Tensor) -> None:
        """(b, width) inputs and (b, classes) targets of further images."""
        h = h.to(self.gram)
        self.gram.addmm_(h.mT, h)
        self.correlations.addmm_(h.mT, targets.to(h))

    def sum_over_processes(self) -> None:
        sum_over_processes(self.gram)
        sum_over_processes(self.correlations)


class Ridge(GrowingBuffers):
    """A linear classifier in closed form, W = (G + strength * I)^-1 Q, whose classes come task by task.

    Attributes:
        gram: G, (width, width); empty before the first task. float64 on the CPU, and no buffer: not every device has float64, and in
            float32 its rounding exceeds a small lambda.
        correlations: Q, (width, classes), likewise.
        weight: W, (width, classes).
        strength: lambda, of the latest solution; 1 before any was chosen.
    """

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self.correlations = torch.zeros(width, 0, dtype=torch.float64)
        self.register_buffer("weight", torch.zeros(width, 0))
        self.strength = 1.0

    def choose(self, fitted: RidgeSums, held_out: list[tuple[Tensor, Tensor]]) -> None:
        """Set `strength` to that of `RIDGES` with the least squared error on held-out images, each process looking at its own."""
        errors = torch.zeros(len(RIDGES), dtype=torch.float64, device=fitted.gram.device)
        for row, strength in enumerate(RIDGES):
            weight = solve(fitted.gram, fitted.correlations, strength)
            for h, targets in held_out:
                errors[row] += torch.inf if weight is None else (h.to(weight) @ weight - targets.to(weight)).square().sum()
        self.strength = RIDGES[int(sum_over_processes(errors).argmin())]

    def update(self, gram: Tensor, correlations: Tensor) -> None:
        """Add the sums of a task with new classes, and solve; raises `strength` where G demands it."""
        check_finite(gram)
        total = gram if self.gram.numel() == 0 else self.gram.to(gram) + gram
        correlations = torch.cat([self.correlations.to(correlations), correlations], dim=1)
        while (weight := solve(total, correlations, self.strength)) is None:
            self.strength *= 10
        self.gram, self.correlations = total.cpu(), correlations.cpu()
        self.weight = weight.to(self.weight).contiguous()  # as what is loaded is: a product with another layout rounds differently

    def forward(self, h: Tensor) -> Tensor:
        """(B, width) -> (B, classes)."""
        with torch.autocast(h.device.type, enabled=False):
            return h @ self.weight


def solve(gram: Tensor, correlations: Tensor, strength: float) -> Tensor | None:
    """(gram + strength * I)^-1 correlations by Cholesky, in float64.

    None if `strength` is below 1000 roundings of the trace, or the matrix not positive definite: a decomposition may still succeed close to
    where it fails, with a solution of noise.
    """
    if strength < 1000 * torch.finfo(gram.dtype).eps * gram.trace():
        return None
    shifted = gram.clone()
    shifted.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if failed else torch.cholesky_solve(correlations, factor)
