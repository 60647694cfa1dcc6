"""The low-rank branch: W becomes W + lora_B lora_A on chosen output rows of a linear layer.

Naming trap: the letters are those of LoRA and PEFT, everywhere in this project. `lora_A` (rank, in) reduces, `lora_B` (out, rank)
increases and starts at zero. The InfLoRA paper swaps them: its designed and frozen B_t is our `lora_A`, its trained A_t our `lora_B`.

Nothing here freezes a weight or knows of tasks: a method decides what trains.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Linear):
    """A linear layer plus a low-rank branch on slices of its output rows; the branch's scale is exactly 1, unless it trains.

    `weight` and `bias` are the very Parameters of the layer it replaces, under the same names.

    Attributes:
        lora_A: (rank, in), read by all slices, or (slices, rank, in) if each has its own. A frozen buffer of zeros to be filled by
            `set_lora_A` or `reset_lora_A`, or, with `train_A`, a trained Parameter that starts as `reset_lora_A` draws it.
        lora_B: (slices, rows of a slice, rank), a trained Parameter that starts at zero.
        scale: (slices,), trained factors of the slices' products, which start at one; None without `train_scale`.
        rows: the slices of output rows, in the order of `lora_B`.
        is_disabled: whether the branch takes no part in `forward`; see `disabled`.

    Args:
        linear: the layer to take over.
        rank: in 1..in_features.
        rows: slices of equal size, ascending, not overlapping; None: one slice with all rows.
        share_A: one `lora_A` for all slices: its product with the input is then computed once.
        train_A: whether `lora_A` trains.
        train_scale: whether each slice has a trained factor.
        generator: where a trained `lora_A` is drawn from; None: torch's global generator.

    Raises:
        ValueError: if `rank` or `rows` do not fit the layer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        *,
        rows: Sequence[slice] | None = None,
        share_A: bool = True,
        train_A: bool = False,
        train_scale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and draw weights only to throw them away
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

        _check_rank(rank, self.in_features)
        self.rows = _checked_rows(rows, self.out_features)
        self.rank = rank
        self.share_A = share_A
        self.is_disabled = False

        shape = (rank, self.in_features) if share_A else (len(self.rows), rank, self.in_features)
        lora_A = self.weight.new_zeros(shape, requires_grad=False)
        if train_A:
            self.lora_A = nn.Parameter(lora_A)
            self.reset_lora_A(generator)
        else:
            self.register_buffer("lora_A", lora_A)
        rows_of_a_slice = self.rows[0].stop - self.rows[0].start
        self.lora_B = nn.Parameter(self.weight.new_zeros(len(self.rows), rows_of_a_slice, rank))
        self.scale = nn.Parameter(self.weight.new_ones(len(self.rows))) if train_scale else None

    def sliced_factors(self) -> tuple[Tensor, Tensor]:
        """The branch as `lora_B` and `lora_A` are shaped, scale included. Differentiable.

        What a subclass returns here, of whatever rank, is what the layer computes and what is merged.
        """
        lora_B = self.lora_B if self.scale is None else self.scale.view(-1, 1, 1) * self.lora_B
        return lora_B, self.lora_A

    def factors(self) -> tuple[Tensor, Tensor]:
        """The branch as one pair of matrices (out, columns) and (columns, in), whose product is the change of `weight`.

        `columns` is the rank, or slices * rank if each slice has its own `lora_A`; rows outside the slices are zero. Differentiable.
        """
        sliced_B, lora_A = self.sliced_factors()
        rank, lora_A = lora_A.shape[-2], lora_A.flatten(0, -2)
        lora_B = sliced_B.new_zeros(self.out_features, len(lora_A))
        for index, rows in enumerate(self.rows):
            columns = slice(None) if self.share_A else slice(index * rank, (index + 1) * rank)
            lora_B[rows, columns] = sliced_B[index]
        return lora_B, lora_A

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.is_disabled:
            return F.linear(input, self.weight, self.bias)
        lora_B, lora_A = self.factors()
        tokens = input.reshape(-1, self.in_features)
        output = F.linear(tokens, self.weight, self.bias)
        # In place on a whole matrix: neither pass then needs another tensor as large as the output, as adding to its slices would.
        # The zero rows of lora_B cost less than that. Autocast leaves in-place products alone, hence the cast.
        output.addmm_(F.linear(tokens, lora_A), lora_B.to(output.dtype).mT)
        return output.view(*input.shape[:-1], self.out_features)

    @torch.no_grad()
    def clear(self) -> None:
        """Make the branch contribute nothing, as when it was new."""
        self.lora_B.zero_()

    @torch.no_grad()
    def set_lora_A(self, lora_A: Tensor) -> None:
        """Fill `lora_A` with a designed factor of the same shape; dtype and device are converted."""
        assert lora_A.shape == self.lora_A.shape, f"lora_A is {tuple(self.lora_A.shape)}, given {tuple(lora_A.shape)}"
        self.lora_A.copy_(lora_A)

    @torch.no_grad()
    def reset_lora_A(self, generator: torch.Generator | None = None) -> None:
        """Draw `lora_A` as LoRA does: Kaiming-uniform with a = sqrt(5), i.e. uniform in +-1/sqrt(in).

        Drawn on the CPU in float32 (or on the generator's device), so that all devices and precisions start alike.
        """
        bound = 1 / math.sqrt(self.in_features)
        device = "cpu" if generator is None else generator.device
        self.lora_A.copy_(torch.empty(self.lora_A.shape, device=device).uniform_(-bound, bound, generator=generator))

    def extra_repr(self) -> str:
        rows = ", ".join(f"{rows.start}:{rows.stop}" for rows in self.rows)
        return f"{super().extra_repr()}, rank={self.rank}, rows=[{rows}]"


Branch = TypeVar("Branch", bound=LowRankLinear)


def kv_rows(embed_dim: int) -> tuple[slice, slice]:
    """The rows of the key and of the value in timm's fused qkv projection (3 embed_dim, embed_dim)."""
    return slice(embed_dim, 2 * embed_dim), slice(2 * embed_dim, 3 * embed_dim)


def chosen_blocks(vit: nn.Module, blocks: Sequence[int] | int | None = None) -> list[int]:
    """The 0-based numbers of a timm ViT's blocks, from the input on.

    Args:
        vit: the transformer.
        blocks: these; or, as a number, so many from the input on, and all where there are fewer; None: all.

    Raises:
        ValueError: if a block does not exist or is named twice, or the list is empty.
    """
    depth = len(cast(nn.Sequential, vit.blocks))
    if isinstance(blocks, int):
        blocks = range(min(blocks, depth))
    chosen = list(range(depth)) if blocks is None else list(blocks)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(depth)):
        raise ValueError(f"method.blocks={chosen} does not fit this backbone; choose distinct numbers from 0..{depth - 1}, or null for all")
    return sorted(chosen)


class _Reached(Exception):
    """Ends a forward pass."""


def run_until(layer: nn.Module, model: Callable[[Tensor], Any], x: Tensor) -> None:
    """Run `model` on `x` as far as the call of `layer`, for hooks that only want what comes before: they still see the layer's input.

    It ends at the first call: a model that calls the layer several times in a pass needs a whole one.
    """

    def end(*_: Any) -> NoReturn:
        raise _Reached

    handle = layer.register_forward_pre_hook(end)
    try:
        model(x)
    except _Reached:
        pass
    finally:
        handle.remove()


def qkv_names(vit: nn.Module, blocks: Sequence[int] | int | None = None) -> list[str]:
    """Names of the qkv projections of a timm ViT: of the `chosen_blocks`.

    Raises:
        ValueError: if `blocks` does not fit the model.
    """
    return [f"blocks.{block}.attn.qkv" for block in chosen_blocks(vit, blocks)]


def inject(
    model: nn.Module,
    names: Iterable[str],
    rank: int,
    *,
    rows: Sequence[slice] | None = None,
    share_A: bool = True,
    train_A: bool = False,
    train_scale: bool = False,
    generator: torch.Generator | None = None,
    layer: Callable[..., Branch] = LowRankLinear,
) -> dict[str, Branch]:
    """Put a branch on each named linear layer of `model`, in place; see `LowRankLinear` for the arguments.

    The model computes what it did before, until `lora_B` trains.

    Args:
        layer: what takes a layer's place: `LowRankLinear` or a subclass.

    Returns:
        name -> the new layer, in the order of `names`.

    Raises:
        ValueError: if a name is no plain `nn.Linear` of the model, or rank or rows do not fit; the model is then unchanged.
    """
    linears = _plain_linears(model, names)
    injected = {
        name: layer(linear, rank, rows=rows, share_A=share_A, train_A=train_A, train_scale=train_scale, generator=generator)
        for name, linear in linears.items()
    }
    for name, module in injected.items():
        _replace(model, name, module)
    return injected


def check_rank(model: nn.Module, names: Iterable[str], rank: int) -> None:
    """Refuse early what `inject` would refuse, without changing the model.

    Raises:
        ValueError: if a name is no plain `nn.Linear` of the model, or `rank` exceeds its inputs or is below 1.
    """
    for linear in _plain_linears(model, names).values():
        _check_rank(rank, linear.in_features)


def branches(model: nn.Module) -> dict[str, LowRankLinear]:
    """name -> layer, for every layer of `model` that has a branch."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as if it had no branches: the un-adapted forward, for queries and teachers."""
    modules = [module for module in branches(model).values() if not module.is_disabled]
    for module in modules:
        module.is_disabled = True
    try:
        yield
    finally:
        for module in modules:
            module.is_disabled = False


def delta_weight(module: LowRankLinear) -> Tensor:
    """lora_B lora_A as a dense (out, in) matrix, zero outside the branch's rows. Differentiable in both factors."""
    lora_B, lora_A = module.factors()
    return lora_B @ lora_A


@torch.no_grad()
def effective_weight(module: nn.Linear) -> Tensor:
    """(out, in): a copy of what the layer multiplies its input with, branch included, detached. Exactly what `merge` would store."""
    if not isinstance(module, LowRankLinear):
        return module.weight.clone()
    # In float64 with one rounding at the end: folding many tasks must not pile up error. Some devices have no float64.
    device = "cpu" if module.weight.device.type == "mps" else module.weight.device
    weight, lora_B, lora_A = (tensor.to(device).double() for tensor in (module.weight, *module.factors()))
    return (weight + lora_B @ lora_A).to(module.weight)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every branch into its weight, in place, and start it again at `lora_B` = 0: the model computes the same."""
    for module in branches(model).values():
        module.weight.copy_(effective_weight(module))
        module.clear()


def remove(model: nn.Module) -> None:
    """Put plain `nn.Linear` layers back, in place, with the same Parameters. What was not merged is dropped."""
    for name, module in branches(model).items():
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = module.weight
        linear.register_parameter("bias", module.bias)
        _replace(model, name, linear.train(module.training))


def merged_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` with its branches folded in and plain layers: a stock timm ViT again. `model` is unchanged."""
    plain = copy.deepcopy(model)
    merge(plain)
    remove(plain)
    return plain


def _plain_linears(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    # Exactly nn.Linear: its subclasses have a forward of their own, or are never called (the projections of nn.MultiheadAttention).
    linears = {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}
    names = list(names)
    unknown = [name for name in names if name not in linears]
    if unknown:
        candidates = sorted({re.sub(r"\b\d+\b", "*", name) for name in linears})
        raise ValueError(f"{', '.join(unknown)} is no plain linear layer of this model; choose among {', '.join(candidates)}")
    return {name: linears[name] for name in names}


def _check_rank(rank: int, in_features: int) -> None:
    if not 1 <= rank <= in_features:
        fault = "is below 1" if rank < 1 else f"exceeds the layer's {in_features} inputs"
        raise ValueError(f"method.rank={rank} {fault}; choose 1..{in_features}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _checked_rows(rows: Sequence[slice] | None, out_features: int) -> tuple[slice, ...]:
    """The slices, or one with all rows; refuses what cannot be one stack of equal matrices."""
    if rows is None:
        return (slice(0, out_features),)
    edges = [edge for part in rows for edge in (part.start, part.stop)]
    sizes = {part.stop - part.start for part in rows}
    is_ascending = edges == sorted(edges) and all(0 <= edge <= out_features for edge in edges)
    if not (is_ascending and len(sizes) == 1 and sizes != {0}):
        given = ", ".join(f"{part.start}:{part.stop}" for part in rows)
        raise ValueError(f"rows=[{given}] do not fit {out_features} outputs; give ascending slices of equal size that do not overlap")
    return tuple(rows)
