"""What adapts a frozen ViT beside LoRA: bottleneck adapters parallel to the MLPs, scales and shifts (SSF), and prompt tokens (VPT).

A block with an adapter computes x + MLP(norm2(x)) + scale * up(relu(down(x))), with x the residual stream after the attention. An adapter
set is one such adapter in every chosen block; a ViT may hold several sets, of which one takes part in `forward`, or none.

Nothing here freezes a weight or knows of tasks: a method decides what trains.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from inflora.lora import chosen_blocks
from inflora.parts.dropout import SampleDropout

# ---- adapters ----------------------------------------------------------------------------------------------------------------------

# The parts of timm's pre-norm block. Other kinds (post-norm, parallel) have others, and are refused.
_BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class Adapter(nn.Module):
    """scale * up(relu(down(x))), with dropout before `up`: a bottleneck that starts as zero.

    `down` starts Kaiming-uniform (a = sqrt 5) with bias 0, `up` at zero. Drawn on the CPU, so that all devices start alike.

    Args:
        dim: width of the tokens.
        bottleneck: width inside.
        scale: fixed factor of the output.
        dropout: its probability.
    """

    def __init__(self, dim: int, bottleneck: int, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.dropout = SampleDropout(dropout)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.scale * self.up(self.dropout(self.down(x).relu()))


class AdaptedBlock(nn.Module):
    """A block of a timm ViT plus parallel adapters, one of each set.

    Its parts are the very modules of the block it replaces, under the same names. Hooks on that block are not taken over: inject first.

    Attributes:
        adapters: the block's adapter of every set.
        active: the set that takes part in `forward`; None: the block computes what it did without adapters.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in _BLOCK_PARTS:
            self.add_module(name, block.get_submodule(name))
        self.adapters = nn.ModuleList()
        self.active: int | None = None
        self._stock = (block,)  # in a tuple, so as not to be a part of this module: for `remove`
        self.training = block.training

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attention)))
        y = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return y if self.active is None else y + self.adapters[self.active](x)

    def stock(self) -> nn.Module:
        """The block as timm made it, with the parts as they are now."""
        (block,) = self._stock
        for name in _BLOCK_PARTS:
            block.add_module(name, self.get_submodule(name))
        block.training = self.training
        return block


def check_adapters(vit: nn.Module, *, bottleneck: int, dropout: float, blocks: Sequence[int] | None = None) -> None:
    """Refuse early what `inject` would refuse, without changing the model.

    Raises:
        ValueError: if an argument is out of range or a block is not timm's pre-norm one.
    """
    if bottleneck < 1:
        raise ValueError(f"method.bottleneck={bottleneck} is below 1; choose 1 or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout={dropout} is no probability; choose 0 up to below 1")
    for index in chosen_blocks(vit, blocks):
        block = _blocks(vit)[index]
        if not isinstance(block, AdaptedBlock) and {name for name, _ in block.named_children()} != set(_BLOCK_PARTS):
            raise ValueError(
                f"blocks of the kind {type(block).__name__} take no adapters; choose a plain vision transformer (backbone.name)"
            )


def inject(
    vit: nn.Module, *, bottleneck: int, scale: float = 0.1, dropout: float = 0.1, blocks: Sequence[int] | None = None
) -> list[Adapter]:
    """Add a fresh set of adapters to `vit`, in place, and make it the active one. The model computes what it did without adapters.

    Args:
        blocks: 0-based numbers of the adapted blocks, the same for every set; None: all.

    Returns:
        The new set, block by block.

    Raises:
        ValueError: as `check_adapters`.
    """
    check_adapters(vit, bottleneck=bottleneck, dropout=dropout, blocks=blocks)
    reference = next(vit.parameters())
    for index in chosen_blocks(vit, blocks):
        if not isinstance(_blocks(vit)[index], AdaptedBlock):
            _blocks(vit)[index] = AdaptedBlock(_blocks(vit)[index])
        block = cast(AdaptedBlock, _blocks(vit)[index])
        adapter = Adapter(int(vit.embed_dim), bottleneck, scale=scale, dropout=dropout)  # type: ignore[arg-type]
        block.adapters.append(adapter.to(reference).train(block.training))
    activate(vit, num_sets(vit) - 1)
    return adapter_set(vit, num_sets(vit) - 1)


def adapted_blocks(vit: nn.Module) -> list[AdaptedBlock]:
    """The blocks that have adapters, from the input on."""
    return [module for module in vit.modules() if isinstance(module, AdaptedBlock)]


def num_sets(vit: nn.Module) -> int:
    """How many sets of adapters `vit` has."""
    return max((len(block.adapters) for block in adapted_blocks(vit)), default=0)


def adapter_set(vit: nn.Module, index: int) -> list[Adapter]:
    """The adapters of one set, block by block."""
    return [cast(Adapter, block.adapters[index]) for block in adapted_blocks(vit)]


def activate(vit: nn.Module, index: int | None) -> None:
    """Let the set `index` take part in `forward`, or none."""
    assert index is None or 0 <= index < num_sets(vit), f"set {index} of {num_sets(vit)}"
    for block in adapted_blocks(vit):
        block.active = index


@contextmanager
def active(vit: nn.Module, index: int | None) -> Iterator[None]:
    """Inside, the set `index` takes part in `forward`, or none; afterwards, the one that did before."""
    before = {block: block.active for block in adapted_blocks(vit)}
    activate(vit, index)
    try:
        yield
    finally:
        for block, old in before.items():
            block.active = old


def remove(vit: nn.Module) -> None:
    """Put timm's own blocks back, in place, with the same modules, and drop all sets."""
    blocks = _blocks(vit)
    for index, block in enumerate(blocks):
        if isinstance(block, AdaptedBlock):
            blocks[index] = block.stock()


def _blocks(vit: nn.Module) -> nn.Sequential:
    return cast(nn.Sequential, vit.blocks)


# ---- scales and shifts -------------------------------------------------------------------------------------------------------------


class ScaleShift(nn.Module):
    """x * scale + shift per channel, both trained: what SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823) puts behind every operation.

    Starts near the identity: `scale` is drawn from N(1, 0.02^2), `shift` from N(0, 0.02^2), on the CPU.

    Attributes:
        is_disabled: whether it lets everything pass unchanged.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(dim).normal_(0, 0.02))
        self.is_disabled = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x if self.is_disabled else x * self.scale + self.shift


def inject_scale_shift(vit: nn.Module) -> list[ScaleShift]:
    """Put a `ScaleShift` behind the patch embedding, the final norm, and every norm and linear layer of the blocks, in place.

    Each is a child `scale_shift` of the layer whose output it takes, which keeps its type and name.
    """
    widths = {name: module.out_features for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
    widths = {name: width for name, width in widths.items() if name.startswith("blocks.")}
    norms = ["norm", *(f"blocks.{block}.{norm}" for block in range(len(_blocks(vit))) for norm in ("norm1", "norm2"))]
    widths |= dict.fromkeys(["patch_embed", *norms], int(vit.embed_dim))  # type: ignore[arg-type]
    reference = next(vit.parameters())
    for name, width in widths.items():
        layer = vit.get_submodule(name)
        layer.scale_shift = ScaleShift(width).to(reference)
        layer.register_forward_hook(_scale_and_shift)
    return scale_shifts(vit)


def _scale_and_shift(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return cast(ScaleShift, layer.scale_shift)(output)  # asking the layer, so that a deep copy uses its own


def scale_shifts(vit: nn.Module) -> list[ScaleShift]:
    """All of them, in the order of the model's modules."""
    return [module for module in vit.modules() if isinstance(module, ScaleShift)]


# ---- prompt tokens -----------------------------------------------------------------------------------------------------------------


class PromptTokens(nn.Module):
    """Learned tokens behind those of the image, for one block or several: visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119).

    They start at zero, as in the public code of APER and RanPAC (the paper draws them uniformly).

    Attributes:
        is_disabled: whether the tokens are left out.
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(num_tokens, dim))
        self.is_disabled = False

    def append(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Forward pre-hook: (B, N, dim) -> (B, N + num_tokens, dim)."""
        if self.is_disabled:
            return None
        x, *others = inputs
        return torch.cat([x, self.tokens.to(x.dtype).expand(len(x), -1, -1)], dim=1), *others

    def drop(self, block: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Forward hook: (B, N + num_tokens, dim) -> (B, N, dim)."""
        return None if self.is_disabled else output[:, : -len(self.tokens)]


def inject_prompt_tokens(vit: nn.Module, num_tokens: int, *, deep: bool) -> list[PromptTokens]:
    """Give `vit` prompt tokens, in place: fresh ones in every block (deep), or only before the first, dropped after the last.

    They are a child `prompt` of the block that they are put before.

    Raises:
        ValueError: if `num_tokens` is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"method.num_tokens={num_tokens} is below 1; choose 1 or more")
    blocks = _blocks(vit)
    reference = next(vit.parameters())
    for first, last in zip(blocks, blocks, strict=True) if deep else [(blocks[0], blocks[-1])]:
        first.prompt = PromptTokens(num_tokens, int(vit.embed_dim)).to(reference)  # type: ignore[arg-type]
        first.register_forward_pre_hook(first.prompt.append)
        last.register_forward_hook(first.prompt.drop)
    return prompt_tokens(vit)


def prompt_tokens(vit: nn.Module) -> list[PromptTokens]:
    """All of them, from the first block on."""
    return [module for module in vit.modules() if isinstance(module, PromptTokens)]


# ---- all of them -------------------------------------------------------------------------------------------------------------------


@contextmanager
def disabled(vit: nn.Module) -> Iterator[None]:
    """Inside, `vit` computes as if it had nothing of this file."""
    switched = [module for module in (*scale_shifts(vit), *prompt_tokens(vit)) if not module.is_disabled]
    for module in switched:
        module.is_disabled = True
    try:
        with active(vit, None):
            yield
    finally:
        for module in switched:
            module.is_disabled = False
