"""A contrastive loss over features of a batch and means of classes seen before."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.8
"""A constant of the codes of HiDe-Prompt and of MOS."""


def contrastive(features: Tensor, means: Tensor) -> Tensor:
    """Cross-entropy of telling each of (C, D) means and (B, D) features from all others by its scalar product with itself, ()."""
    with torch.autocast(features.device.type, enabled=False):
        rows = torch.cat([means, features.float()])
        return F.cross_entropy(rows @ rows.mT / TEMPERATURE, torch.arange(len(rows), device=rows.device))
