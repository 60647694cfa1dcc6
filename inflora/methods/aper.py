"""APER, formerly ADAM: adapt to the first task, then class means of old and new features (Zhou et al., IJCV 2024, arXiv 2303.07338)."""

from typing import Any, Literal

import torch
from torch import Tensor

from inflora.data.tasks import Task
from inflora.parts import adapters
from inflora.parts.first_task import FirstTaskMethod
from inflora.parts.prototypes import Prototypes, class_means


class APER(FirstTaskMethod):
    """`simplecil` on the features of two backbones side by side: the pretrained one, and one adapted to the first task.

    On the first task a small module in the backbone (`variant`) and a cosine classifier with learned scale train; the classifier is thrown
    away and the backbone never changes again. Prototypes are class means of both class tokens, concatenated; a score is the cosine with the
    whole vector, so the backbone with the longer features weighs more.

    Official code: github.com/zhoudw-zdw/RevisitingCIL, also in LAMDA-PILOT, which starts from weights fine-tuned on ImageNet-1k and trains
    some variants for other epochs; here the backbone is what `backbone` says. Loss: cross-entropy over the classes of the first task, which
    with a single class is zero: the module then stays as it started.

    Trains, on the first task only (D = embed_dim, L blocks): adapter L * (2 * D * bottleneck + bottleneck + D), ssf L * 22 * D + 4 * D with
    MLPs of 4 * D, vpt_deep L * num_tokens * D, vpt_shallow num_tokens * D. Stores that, and 2 * D floats per class. Every image takes two
    passes through the backbone.

    The paper's variant with full fine-tuning is not here: it needs a second backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["adapter", "ssf", "vpt_shallow", "vpt_deep"],
        bottleneck: int,
        adapter_scale: float,
        dropout: float,
        num_tokens: int,
    ) -> None:
        super().__init__(
            backbone, variant=variant, bottleneck=bottleneck, adapter_scale=adapter_scale, dropout=dropout, num_tokens=num_tokens
        )
        self.prototypes = Prototypes(2 * self.heads.embed_dim)

    def both_features(self, x: Tensor) -> Tensor:
        """Class tokens of the pretrained and of the adapted backbone, (B, 2 * embed_dim)."""
        with adapters.disabled(self.backbone):
            pretrained = self.features(x)
        return torch.cat([pretrained, self.features(x)], dim=1)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.prototypes.add(class_means(self.both_features, task, 2 * self.heads.embed_dim, self.device))

    def predict(self, x: Tensor) -> Tensor:
        return self.prototypes(self.both_features(x))
