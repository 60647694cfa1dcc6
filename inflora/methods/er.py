"""ER: experience replay (Chaudhry et al. 2019, arXiv 1902.10486; Riemer et al., ICLR 2019)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.device import to_device
from inflora.parts.replay import ReplayMethod, Selection


class ER(ReplayMethod):
    """Every batch is joined by images of a buffer, and the softmax over all seen classes trains on both alike.

    Loss: cross-entropy over all seen classes, averaged over new and replayed images together; freshly augmented. Keeps raw training
    images: not comparable with methods that keep none.

    Code: mammoth (models/er.py). Trains: one branch on keys and values (`variant=peft`, ours) or every weight (`variant=full`, as there),
    and all heads. Stores between tasks: the trained numbers, and the buffer, H * W * 3 bytes per image (counted as so many numbers): at
    most `buffer_size` images, or `per_class` times the seen classes.

    Readings: mammoth's reservoir counts an image again in every epoch, here it counts once; mammoth draws without replacement, here each
    new image draws its own. The buffer holds images of the current task too, as there. Cross-entropy over the new classes alone on the
    new images would be ER-ACE.

    Args:
        backbone, variant, rank, blocks: see `TunedMethod`.
        selection, buffer_size, per_class: see `ReplayBuffer`.
        replay_ratio: replayed images for each new one.

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
        replay_ratio: int,
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
        if replay_ratio < 1:
            raise ValueError(f"method.replay_ratio={replay_ratio} is below 1; choose a whole number of replayed images for each new one")
        self.replay_ratio = replay_ratio

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        labels = y
        if len(self.buffer):
            replayed, rows = self.replay(self.replay_ratio)
            x, labels = torch.cat([x, replayed]), torch.cat([y, to_device(self.buffer.labels[rows], y.device)])
        scores = self.heads(self.features(x))
        self.observe(scores[: len(y)], y)
        return F.cross_entropy(scores, labels)
