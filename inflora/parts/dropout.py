"""Dropout whose masks belong to the images, not to the process that happens to have them."""

import torch
from torch import Tensor, nn

from inflora.seeding import uniform


class SampleDropout(nn.Module):
    """`nn.Dropout` with a mask that depends only on the step and on each image's id: so it is the same in one process and in several.

    Every call takes one number from torch's generator on the CPU, which the trainer seeds anew for every step, alike in all processes. A
    mask costs three times what torch's does: 8 ms instead of 3 for 64 images of 65 tokens and 64 numbers each, on one core.

    Attributes:
        sample_ids: (B,) int64 ids of the images of the next batch, on its device; `Method.sample_ids` sets them. None: their places in
            the batch.

    Args:
        p: probability of a zero, in [0, 1).
    """

    sample_ids: Tensor | None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.sample_ids = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...).

        Raises:
            RuntimeError: in training mode, if the batch has another number of images than there are ids.
        """
        if not self.training or self.p == 0:
            return x
        ids = torch.arange(len(x), device=x.device) if self.sample_ids is None else self.sample_ids
        if len(ids) != len(x):
            raise RuntimeError(f"dropout has the ids of {len(ids)} images for a batch of {len(x)}; set sample_ids to those of the batch")
        key = torch.randint(2**62, ())  # as a tensor: a number would tie a compiled graph to this step
        keeps = uniform(key, ids, x[0].numel()).view_as(x) >= self.p
        return x / (1 - self.p) * keeps

    def extra_repr(self) -> str:
        return f"p={self.p}"
