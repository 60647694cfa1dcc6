"""Prompts for a frozen vision transformer: where they enter it, and how an image's own are chosen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora.method import Method

# ---- prefix tuning -----------------------------------------------------------------------------------------------------------------


class PrefixAttention(nn.Module):
    """timm's attention, its keys and values preceded by a prefix of each image's own; the number of tokens stays.

    The prefix stands beside the projected keys and values: it passes through neither the qkv projection nor `k_norm`.

    Attributes:
        attn: the module it stands for, untouched.
        prefix: (B, 2, L, embed_dim), keys in [:, 0] and values in [:, 1]; None: what `attn` alone computes. See `prefixes`.
        is_compensated: whether the weights that a token gives to the prefix are divided by their sum, those of the tokens staying as they
            are: a prefix then counts from the start as much as later (LAE, arXiv 2303.10070).
    """

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.prefix: Tensor | None = None
        self.is_compensated = False
        self.train(attn.training)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(B, N, embed_dim) -> (B, N, embed_dim)."""
        attn: Any = self.attn
        if self.prefix is None:
            return attn(x, **options)
        assert options.get("attn_mask") is None and not options.get("is_causal"), "no mask knows of the prefix"
        gate = getattr(attn, "gate", None)
        q, k, v = _heads(attn.qkv(x).unflatten(2, (3, -1)).transpose(1, 2), attn.num_heads)
        prefix_k, prefix_v = _heads(self.prefix.to(v.dtype), attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        k, v = torch.cat([prefix_k.to(k.dtype), k], dim=2), torch.cat([prefix_v, v], dim=2)
        if self.is_compensated:
            to_prefix, to_tokens = (q * attn.scale @ k.mT).softmax(dim=-1).tensor_split([prefix_k.shape[2]], dim=-1)
            to_prefix = to_prefix / to_prefix.sum(dim=-1, keepdim=True).clamp(min=1e-12)
            y = attn.attn_drop(torch.cat([to_prefix, to_tokens], dim=-1)) @ v
        elif attn.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0, scale=attn.scale)
        else:
            y = attn.attn_drop((q * attn.scale @ k.mT).softmax(dim=-1)) @ v
        y = getattr(attn, "norm", nn.Identity())(y.transpose(1, 2).flatten(2))
        return attn.proj_drop(attn.proj(y if gate is None else y * gate(x).sigmoid()))


def _heads(x: Tensor, num_heads: int) -> Iterator[Tensor]:
    """(B, parts, L, num_heads * head_dim) -> each part as (B, num_heads, L, head_dim)."""
    return iter(x.unflatten(3, (num_heads, -1)).transpose(2, 3).unbind(1))


def install_prefixes(vit: nn.Module, blocks: Sequence[int], make: Callable[[nn.Module], PrefixAttention] = PrefixAttention) -> None:
    """Make these blocks of a timm ViT ready for `prefixes`; it computes what it did before.

    Args:
        make: what takes an attention's place.

    Raises:
        ValueError: if the blocks' attention is not the plain one.
    """
    for block in _blocks(vit, blocks):
        kind = type(block.attn).__name__ if hasattr(block, "attn") else "no attention of its own"
        if kind != "Attention":
            raise ValueError(
                f"backbone.name: prefixes need blocks with timm's plain Attention, not {kind}; choose a plain vision transformer"
            )
        block.attn = make(block.attn)


@contextmanager
def prefixes(vit: nn.Module, by_block: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, a forward pass of `vit` has these prefixes, (B, 2, L, embed_dim) for each of some installed blocks."""
    attentions = [block.attn for block in _blocks(vit, list(by_block))]
    for attention, prefix in zip(attentions, by_block.values(), strict=True):
        attention.prefix = prefix
    try:
        yield
    finally:
        for attention in attentions:
            attention.prefix = None


def _blocks(vit: Any, blocks: Sequence[int]) -> list[Any]:
    return [vit.blocks[block] for block in blocks]


# ---- prompt tuning -----------------------------------------------------------------------------------------------------------------


class PromptTokens:
    """Tokens of each image's own, put behind the class token before the first block of a timm ViT; without position embedding.

    Args:
        vit: gets a hook that does nothing outside `inserted`.
    """

    def __init__(self, vit: Any) -> None:
        self.tokens: Tensor | None = None
        vit.blocks[0].register_forward_pre_hook(self._insert)

    @contextmanager
    def inserted(self, tokens: Tensor) -> Iterator[None]:
        """Inside, a forward pass has these tokens, (B, L, embed_dim), at the positions 1 to L."""
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = None

    def _insert(self, block: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if self.tokens is None:
            return None
        x, *rest = inputs
        return torch.cat([x[:, :1], self.tokens.to(x.dtype), x[:, 1:]], dim=1), *rest


# ---- choosing ----------------------------------------------------------------------------------------------------------------------


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine similarity of (B, D) queries and (..., M, D) keys: (..., B, M), in float32 whatever the precision of the rest."""
    with torch.autocast(query.device.type, enabled=False):
        return F.normalize(query.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT


def uniform_parameter(shape: Sequence[int], low: float, high: float, device: torch.device) -> nn.Parameter:
    """A Parameter drawn on the CPU, so that all devices start alike."""
    return nn.Parameter(torch.empty(shape).uniform_(low, high).to(device))


def choose_blocks(vit: Any, blocks: Sequence[int] | None, key: str, twelfths: tuple[int, int]) -> list[int]:
    """Block numbers given by the user, or a share of the depth.

    Args:
        blocks: 0-based and distinct; None: the blocks from one to the other twelfth of the depth, rounded up, and at least one.
        key: the configuration key, for messages.

    Raises:
        ValueError: if a block does not exist or is named twice, or there is none.
    """
    depth = len(vit.blocks)
    if blocks is None:
        start, stop = (-(-depth * part // 12) for part in twelfths)
        chosen = list(range(start, max(stop, start + 1)))
    else:
        chosen = list(blocks)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(depth)):
        raise ValueError(f"{key}={chosen} does not fit this backbone; choose distinct numbers from 0..{depth - 1}")
    return chosen


def check_at_least(**values: tuple[float, float]) -> None:
    """Refuse numbers below their minimum: name of the key -> (value, minimum)."""
    for name, (value, minimum) in values.items():
        if value < minimum:
            raise ValueError(f"method.{name}={value} is out of range; choose {minimum} or more")


def half_length(length: int, key: str) -> int:
    """Prefix tokens for the keys, and as many for the values, out of `length` in all."""
    if length < 2 or length % 2:
        raise ValueError(f"method.{key}={length} cannot be halved into tokens for keys and for values; choose an even number from 2 on")
    return length // 2


# ---- the frame of the methods ------------------------------------------------------------------------------------------------------


class PromptMethod(Method):
    """A frozen backbone whose prompts depend on the image through a query: the feature of the image without any prompt.

    A subclass defines `prompts`, and declares what trains. Prompts are prefixes here; a subclass may let them enter otherwise.

    Args:
        blocks: the blocks that get prefixes.
    """

    def __init__(self, backbone: nn.Module, *, blocks: Sequence[int]) -> None:
        super().__init__(backbone)
        self.blocks = list(blocks)
        install_prefixes(backbone, self.blocks)

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """(B, embed_dim) float32 feature under the backbone as it came, without dropout."""
        is_training = self.backbone.training
        self.backbone.eval()
        query = self.backbone(x)
        self.backbone.train(is_training)
        return query.float()

    def prompts(self, query: Tensor) -> Mapping[int, Tensor]:
        """The prompts that go with (B, embed_dim) queries at test: block -> (B, 2, L, embed_dim)."""
        raise NotImplementedError

    def prompted(self, x: Tensor, prompts: Mapping[int, Tensor]) -> Tensor:
        """(B, embed_dim) feature under these prompts."""
        with prefixes(self.backbone, prompts):
            return self.backbone(x)

    def features(self, x: Tensor) -> Tensor:
        return self.prompted(x, self.prompts(self.query(x)))
