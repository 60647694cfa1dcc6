"""DER++: dark experience replay (Buzzega et al., NeurIPS 2020, arXiv 2004.07211)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.device import to_device
from inflora.parts.collective import gather_over_processes
from inflora.parts.replay import ReplayMethod, Selection, gather_ids
from inflora.seeding import uniform


class DERpp(ReplayMethod):
    """A buffer keeps the model's scores with each image: replayed images are held to these scores, and others of them to their labels.

    Loss: cross-entropy over all seen classes on the new images + `alpha` * squared distance to the stored scores on one draw of the
    buffer + `beta` * cross-entropy on a second draw. `beta=0` is DER. Keeps raw training images: not comparable with methods that keep
    none.

    Code: mammoth (models/derpp.py). Trains: one branch on keys and values (`variant=peft`, ours) or every weight (`variant=full`, as
    there), and all heads. Stores between tasks: the trained numbers and the buffer, per image H * W * 3 bytes and as many scores as
    classes were seen.

    Readings: mammoth's head has all classes from the start; here it grows, and scores are compared on the classes known when they were
    stored (mean over these, then over the images). They are those of the training step, augmented view, before its update. mammoth
    inserts an image anew in every epoch; here it has one place, and in its n-th epoch takes the new scores with probability 1/n, so the
    stored scores too come from a uniformly drawn epoch.

    Args:
        backbone, variant, rank, blocks: see `TunedMethod`.
        selection, buffer_size, per_class: see `ReplayBuffer`.
        alpha: weight of the stored scores.
        beta: weight of the labels.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["peft", "full"],
        rank: int,
        blocks: list[int] | None,
        selection: Selection,
        buffer_size: int | None,
        per_class: int | None,
        alpha: float,
        beta: float,
    ) -> None:
        super().__init__(
            backbone,
            variant=variant,
            rank=rank,
            blocks=blocks,
            selection=selection,
            buffer_size=buffer_size,
            per_class=per_class,
        )
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise ValueError(f"method.{name}={value} is negative; choose 0 or more")
        self.alpha, self.beta = alpha, beta
        self._scores: Tensor | None = None  # of the step's new images, until `after_step`

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._refresh_key = int(torch.randint(2**62, ()))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        draws = [self.replay(1) for _ in range(2)] if len(self.buffer) and (self.alpha or self.beta) else []
        scores = self.heads(self.features(torch.cat([x, *(replayed for replayed, _ in draws)])))
        new, *old = scores.split(len(x))
        self.observe(new, y)
        self._scores = new.detach() if self._scores is None else torch.cat([self._scores, new.detach()])  # a batch may come in parts
        loss = F.cross_entropy(new, y)
        if not draws:
            return loss
        (_, first), (_, second) = draws
        loss = loss + self.alpha * self.distance(old[0], first).mean()
        return loss + self.beta * F.cross_entropy(old[1], to_device(self.buffer.labels[second], y.device))

    def distance(self, scores: Tensor, rows: Tensor) -> Tensor:
        """(b,) mean squared difference between `scores` (b, C) and those stored in `rows`, over the classes these know."""
        device = scores.device
        stored = to_device(self.buffer.scores, device)[to_device(rows, device)]
        num_known = to_device(self.buffer.num_known[rows], device).unsqueeze(1)
        is_known = torch.arange(stored.shape[1], device=device) < num_known
        return ((scores[:, : stored.shape[1]].float() - stored).square() * is_known).sum(1) / num_known.squeeze(1)

    def after_step(self) -> None:
        num_classes = self.heads.num_classes
        own = torch.zeros(0, num_classes, device=self.device) if self._scores is None else self._scores
        self._scores = None  # a process without images of the next step gets none
        positions, scores = gather_ids(self.sample_ids, self.device), gather_over_processes(own.float())
        takes_new = (uniform(self._refresh_key, positions, 1).squeeze(1) * (self._epoch + 1) < 1).nonzero().squeeze(1)
        self.buffer.refresh(self.task, positions[takes_new], scores[to_device(takes_new, scores.device)])
        self.buffer.offer(self.task, positions, num_classes=num_classes, scores=scores)
