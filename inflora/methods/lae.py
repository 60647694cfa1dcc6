"""LAE: learning, accumulation, ensemble (Gao et al., ICCV 2023, arXiv 2303.10070)."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora import lora
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts.adapters import Adapter
from inflora.parts.prompts import PrefixAttention, install_prefixes
from inflora.parts.snapshot import Snapshot
from inflora.seeding import draw_

VARIANTS = ("lora", "adapter", "prefix")


class AttentionAdapter(Adapter):
    """scale * up(gelu(down(x))) with a trained scale, beside the attention of a block; starts as zero."""

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__(dim, bottleneck, scale=1.0, dropout=0.0)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.scale * self.up(F.gelu(self.down(x)))


def _add_adapter(attention: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + cast(AttentionAdapter, attention.adapter)(inputs[0])


class LearnedPrefix(PrefixAttention):
    """Attention whose keys and values are preceded by learned tokens, the same for all images, with a trained factor each; compensated."""

    def __init__(self, attn: nn.Module, length: int, dim: int) -> None:
        super().__init__(attn)
        self.is_compensated = True
        self.tokens = nn.Parameter(torch.empty(2, length, dim).uniform_(0, 0.01))
        self.scale = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        self.prefix = (self.scale * self.tokens).expand(len(x), -1, -1, -1)
        try:
            return super().forward(x, **options)
        finally:
            self.prefix = None


class LAE(Method):
    """A small tuned module that learns all tasks, and a slow copy of it; the two answer together.

    The online module trains on every task, on later ones only after the head has trained alone for `freeze_epochs`. From the second task on
    the offline module, a copy of what the first task made, follows it by an exponential moving average after every step. A score is the
    larger one of the two modules' probabilities over all seen classes; after the first task there is the online one alone.

    Variants (the published sizes):
        lora: branches of rank 5 on keys and values, each product with a trained factor.
        adapter: bottlenecks of width 5 with GELU and a trained factor, parallel to the attention.
        prefix: 10 tokens before the keys and 10 before the values, a trained factor for each ten; attention weights compensated.

    Trains: the online module and the current head (cross-entropy over the current task's classes). Stores: both modules, for lora
    2 * num_blocks * (4 * size * embed_dim + 2) floats with num_blocks the adapted ones; nothing grows but the heads.

    Official code: github.com/gqk/LAE. In LAMDA-PILOT the online module is frozen in the first task too and the average starts from an
    untrained copy; here, as in the official code, neither. Heads start at N(0, 0.001^2) with zero bias, as there.

    Args:
        backbone: a timm vision transformer without head.
        variant: what the modules are.
        size: rank of a branch, width of a bottleneck, or length of a prefix.
        first_blocks: share of the blocks that are adapted, in (0, 1]; the first ones, at least one.
        freeze_epochs: epochs in which only the head trains, from the second task on; with `trainer.epochs` no larger, all of them.
        ema_decay: share of the offline module that stays in a step, in [0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["lora", "adapter", "prefix"],
        size: int,
        first_blocks: float,
        freeze_epochs: int,
        ema_decay: float,
    ) -> None:
        super().__init__(backbone)
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        if not 1 <= size <= self.heads.embed_dim:
            raise ValueError(f"method.size={size} does not fit this backbone; choose 1..{self.heads.embed_dim}")
        if not 0 < first_blocks <= 1:
            raise ValueError(f"method.first_blocks={first_blocks} is no share of the blocks; choose above 0 and at most 1")
        if freeze_epochs < 0:
            raise ValueError(f"method.freeze_epochs={freeze_epochs} is below 0; choose 0 or more")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"method.ema_decay={ema_decay} is out of range; choose 0..1")
        self.freeze_epochs, self.ema_decay = freeze_epochs, ema_decay
        stock = {id(parameter) for parameter in backbone.parameters()}
        blocks = list(range(max(1, round(first_blocks * len(backbone.blocks)))))
        self._inject(variant, size, blocks)
        self.online = {name: p for name, p in backbone.named_parameters() if id(p) not in stock}
        self.offline = Snapshot()
        self.offline.take(self.online)

    def _inject(self, variant: str, size: int, blocks: list[int]) -> None:
        if variant == "lora":
            rows = lora.kv_rows(self.heads.embed_dim)
            lora.inject(
                self.backbone, lora.qkv_names(self.backbone, blocks), size, rows=rows, share_A=False, train_A=True, train_scale=True
            )
        elif variant == "adapter":
            for block in blocks:
                attention = self.backbone.get_submodule(f"blocks.{block}.attn")
                attention.adapter = AttentionAdapter(self.heads.embed_dim, size).to(self.device)
                attention.register_forward_hook(_add_adapter)
        else:
            install_prefixes(self.backbone, blocks, lambda attn: LearnedPrefix(attn, size, self.heads.embed_dim).to(self.device))

    @property
    def is_first_task(self) -> bool:
        return len(self.heads) == 1

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        draw_(self.heads.current.weight, nn.init.normal_, std=0.001)
        nn.init.zeros_(self.heads.current.bias)
        if len(self.heads) == 2:
            self.offline.take(self.online)

    def begin_epoch(self, epoch: int) -> None:
        is_frozen = not self.is_first_task and epoch < self.freeze_epochs
        for parameter in self.online.values():
            parameter.requires_grad_(not is_frozen)

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.online.values()), "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.local_cross_entropy(self.features(x), y)

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.is_first_task:
            for name, old in self.offline.tensors.items():
                old.lerp_(self.online[name], 1 - self.ema_decay)

    def predict(self, x: Tensor) -> Tensor:
        """Probabilities, (B, seen classes); with two modules the larger ones of each pair, which sum to more than one."""
        probabilities = self.heads(self.features(x)).float().softmax(1)
        if self.is_first_task:
            return probabilities
        return torch.maximum(probabilities, self.heads(self.offline.call(self.backbone, x)).float().softmax(1))
