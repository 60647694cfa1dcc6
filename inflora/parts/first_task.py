"""The frame of methods that adapt the backbone to the first task only and classify with statistics of frozen features afterwards."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inflora.classifier import ClassCounts
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts import adapters
from inflora.parts.prototypes import CosineClassifier

VARIANTS = ("adapter", "ssf", "vpt_shallow", "vpt_deep")


class FirstTaskMethod(Method):
    """On the first task a module in the frozen backbone trains with a cosine classifier, which is thrown away; after that nothing trains.

    A subclass adds what classifies: statistics in `end_task`, `predict`.

    Args:
        backbone: a timm vision transformer without head.
        variant: what trains on the first task: "adapter" (beside every MLP), "ssf" (scale and shift behind every operation), "vpt_shallow"
            or "vpt_deep" (prompt tokens before the first block, or every block); "none" where the subclass allows it.
        bottleneck: width of an adapter.
        adapter_scale: factor of its output.
        dropout: inside an adapter.
        num_tokens: prompt tokens per block.
        variants: what is allowed.

    Raises:
        ValueError: if the variant is unknown, or an argument does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: str,
        bottleneck: int,
        adapter_scale: float,
        dropout: float,
        num_tokens: int,
        variants: tuple[str, ...] = VARIANTS,
    ) -> None:
        super().__init__(backbone)
        if variant not in variants:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(variants)}")
        self.heads = ClassCounts(self.heads.embed_dim)
        self.classifier: CosineClassifier | None = None
        modules: dict[str, list[Any]] = {"none": []}
        if variant == "adapter":
            modules[variant] = adapters.inject(backbone, bottleneck=bottleneck, scale=adapter_scale, dropout=dropout)
        elif variant == "ssf":
            modules[variant] = adapters.inject_scale_shift(backbone)
        elif variant != "none":
            modules[variant] = adapters.inject_prompt_tokens(backbone, num_tokens, deep=variant == "vpt_deep")
        self.tuned: tuple[nn.Module, ...] = tuple(modules[variant])  # a tuple: they are parts of the backbone already

    def begin_task(self, task: Task) -> None:
        is_first = len(self.heads) == 0
        super().begin_task(task)
        if is_first and self.tuned:
            self.classifier = self._make_classifier()

    def _make_classifier(self) -> CosineClassifier:
        return CosineClassifier(self.heads.embed_dim, self.heads.sizes[0]).to(self.device)

    def param_groups(self) -> list[dict[str, Any]]:
        if self.classifier is None:
            return []
        return [
            {"params": [parameter for module in self.tuned for parameter in module.parameters()], "role": "branch"},
            {"params": list(self.classifier.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.classifier is not None
        scores = self.classifier(self.features(x))
        self.observe(scores, y)
        return F.cross_entropy(scores, y)

    def end_task(self, task: Task) -> None:
        self.classifier = None

    def extra_state(self) -> dict[str, Any]:
        return {"has_classifier": self.classifier is not None}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.classifier = self._make_classifier() if state["has_classifier"] else None
