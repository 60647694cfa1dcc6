"""Which input directions a layer must keep, and in which of the others the next branch may learn.

Everything here is linear algebra on second moments C = mean of h h^T (dim, dim) of a layer's inputs h: no task, no ViT, no device policy.

- `CovarianceAccumulator` collects C of several layers in one pass over the data;
- `DualGPM` remembers, task after task, the subspace that old inputs occupy;
- `design_branch` picks the directions of the new inputs outside that subspace: the frozen `lora_A` of InfLoRA.

All decompositions run in float64 on the CPU and in free coordinates: with Q (dim, f) an orthonormal basis of the directions not yet
protected, R = P C = Q (Q^T C), so the left singular vectors of R are Q times those of the (f, dim) matrix Q^T C. Nothing computed that
way can enter the protected space, whatever the tolerance. They are found as eigenvectors of the square Q^T C^2 Q, about 1.7 times
faster than singular vectors (dim 768). The square loses every singular value below 1e-8 of the largest; that is less than what a
covariance in float32 can tell, but in a float64 one the rank could be misjudged: those get the singular value decomposition.

Where only the first few directions of a wide layer are asked for, block Lanczos iterations find them in a fraction of the time: they
apply P and C to a few vectors at a time, in the layer's own coordinates, and what they find is projected once more.

Source: Liang & Li 2024 (InfLoRA, arXiv 2404.00228) and its reference implementation; DualGPM after Liang & Li 2023. Departures are
stated where they occur.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A sum of squares within this relative distance of the energy it is compared with counts as equal to it. Ties happen only in spectra
# made by hand, where rounding would otherwise decide them.
_TIE = 1e-9

# Singular values below this, relative to the norm, drown when a matrix is squared in float64 (the root of its epsilon, with a margin).
_SQUARE_LOSES = 1e-7

# Where so many dimensions are free, a few directions are found by iterations; below, a whole decomposition is as fast.
_WIDE = 320

# Vectors that an iteration adds. A product with so many takes 1.6 times as long as one with a single vector (dim 768).
_BLOCK = 8

# Tokens per float32 product. Without the cut, the rounding of a batch of 128 images (25,000 tokens) is about ten times larger, relative
# to the sum, for 6 % less time (dim 768, one CPU thread).
_CHUNK = 1024


class MissingDirectionsWarning(UserWarning):
    """`design_branch` found fewer directions than the rank asks for; the rows it could not fill are zero."""


def threshold_at(task_index: int, num_tasks: int, start: float, end: float) -> float:
    """Energy threshold for the update after task `task_index` (0-based): start + (end - start) t / T, which never reaches `end`.

    Tasks beyond the planned `num_tasks` keep the last planned value: at t = T the formula would protect everything.

    Raises:
        ValueError: if `start` or `end` lies outside [0, 1], or `num_tasks` is below 1.
    """
    for key, value in (("method.threshold", start), ("method.threshold_end", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{key}={value} is not a fraction of energy; choose a number from 0 to 1")
    if num_tasks < 1:
        raise ValueError(f"num_tasks={num_tasks} leaves nothing to schedule; choose 1 or more")
    return start + (end - start) * min(task_index, num_tasks - 1) / num_tasks


class DualGPM:
    """The subspace that old tasks' inputs of one layer occupy, stored as itself or as its complement, whichever is smaller.

    Attributes:
        dim: width of the layer's input.
        basis: (dim, k) float64 on the CPU, orthonormal columns. Fresh: (dim, 0).
        kind: "remove" if `basis` spans the protected space, "retain" if it spans the free one. Fresh: "remove".

    Args:
        dim: width of the layer's input.
        energy: what the thresholds are fractions of. "gram": the sum of the squared singular values of C, as the published numbers were
            made; "input": the sum of the singular values of C, i.e. the inputs' own energy, as the paper's text says. "input" protects
            far more directions at the same threshold.
        dual: False gives plain GPM: the protected space is always the one stored.

    Raises:
        ValueError: if `energy` is unknown.

    Source: Saha et al. 2021 (GPM), Liang & Li 2023 (DualGPM). Departures from the reference implementation: a first task that fills
    half the space or more stores the free space (the reference stores the used one under that name), and directions that are only
    rounding never enter.
    """

    def __init__(self, dim: int, *, energy: Literal["gram", "input"] = "gram", dual: bool = True) -> None:
        if energy not in ("gram", "input"):
            raise ValueError(f"method.energy={energy} is unknown; choose gram or input")
        self.dim = dim
        self.energy = energy
        self.dual = dual
        self.kind: Literal["remove", "retain"] = "remove"
        self.basis = torch.zeros(dim, 0, dtype=torch.float64)

    @property
    def dimension(self) -> int:
        """Dimension of the protected subspace."""
        columns = self.basis.shape[1]
        return columns if self.kind == "remove" else self.dim - columns

    def free_basis(self) -> Tensor:
        """(dim, dim - dimension) float64: an orthonormal basis of the space that is not protected."""
        if self.kind == "retain":
            return self.basis
        if self.dimension == 0:
            return torch.eye(self.dim, dtype=torch.float64)
        return torch.linalg.qr(self.basis, mode="complete").Q[:, self.dimension :]

    def project(self, covariance: Tensor) -> Tensor:
        """P C: the part of `covariance` (dim, dim) whose columns lie in the free space. Computed in float64; dtype and device are kept."""
        C = _on_cpu(covariance, self.dim).double()
        inside = self.basis @ (self.basis.mT @ C)
        return (inside if self.kind == "retain" else C - inside).to(covariance)

    def update(self, covariance: Tensor, threshold: float) -> None:
        """Protect the fewest leading directions of P C that raise the captured energy of C to `threshold`.

        At equality, "remove" stops and "retain" takes one more. The first update with "gram" stops one direction short of the threshold,
        with at least one direction (the reference's rule). A covariance of zeros changes nothing: a fresh memory stays fresh.

        Args:
            covariance: (dim, dim) second moment of the finished task's inputs, any float type and device.
            threshold: fraction of the energy, in [0, 1]; at 1 every direction above rounding is protected (all but one in a first
                update with "gram").

        Raises:
            ValueError: if `threshold` lies outside [0, 1], or the covariance has another shape or holds NaN or infinity.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not a fraction of energy; choose a number from 0 to 1")
        moment = _Moment.of(covariance, self.dim)
        total = moment.norm**2 if self.energy == "gram" else moment.C.trace().item()
        if total <= 0:
            return

        allowed = (1 - threshold) * total
        found, rest = self._directions(moment, total, allowed)
        values = found.values[found.values > moment.rounding]
        energies = values.square() if self.energy == "gram" else values
        missed = energies.flip(0).cumsum(0).flip(0) + rest  # missed[j]: energy still unprotected after adding j directions

        is_first = self.dimension == 0
        if self.kind == "retain":
            count = int((missed >= allowed * (1 - _TIE)).sum())
        else:
            count = int((missed > allowed * (1 + _TIE)).sum())
            if is_first:
                count = min(max(1, count - 1 if self.energy == "gram" else count), len(values))

        if count == 0:
            return

        new, used = found.vectors(count), self.dimension + count
        # There is no way back from "retain": the used space only grows.
        if self.kind == "retain" or (self.dual and (2 * used > self.dim or (is_first and 2 * used == self.dim))):
            free, self.kind = self.free_basis(), "retain"
            kept = free @ torch.linalg.qr(free.mT @ new, mode="complete").Q[:, count:]
        else:
            kept = torch.cat([self.basis, new], dim=1)
        # Orthonormal up to rounding already; QR keeps that rounding from adding up over tasks.
        self.basis = torch.linalg.qr(kept).Q.contiguous()

    def _directions(self, moment: "_Moment", total: float, allowed: float) -> tuple["_Directions", Tensor | float]:
        """Enough leading directions of P C that at most `allowed` energy is left, and how much is left in those not found.

        What is left is a difference, and holds what rounding made of the directions not found: both have to be small beside `allowed`.
        """
        if self.energy == "gram" and allowed > 1e-6 * total and allowed > 1e3 * self.dim * moment.rounding**2:
            inside = (self.basis.mT @ moment.C).square().sum()
            energy = inside if self.kind == "retain" else total - inside

            def rest(values: Tensor) -> Tensor:
                return energy - values.square().sum()

            found = _leading(moment, self, lambda values: bool(rest(values) < allowed * (1 - _TIE)), two_sided=False)
            if found is not None:
                return found, rest(found.values).clamp(min=0)
        return _all(moment, self.free_basis(), two_sided=self.energy == "input"), 0.0

    def state_dict(self) -> dict[str, Any]:
        """The basis (a tensor) and plain values; `load_state_dict` restores them exactly."""
        return {"basis": self.basis.clone(), "kind": self.kind, "dim": self.dim, "energy": self.energy, "dual": self.dual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved memory.

        Raises:
            ValueError: if it was saved with another dim, energy or dual.
        """
        for key in ("dim", "energy", "dual"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the saved memory has {key}={state[key]}, this one has {key}={getattr(self, key)}; use the saved value")
        self.kind = state["kind"]
        self.basis = state["basis"].to("cpu", torch.float64).clone()


def design_branch(
    covariance: Tensor,
    memory: DualGPM,
    rank: int,
    *,
    decomposition: Literal["PC", "PCP"] = "PC",
    scale: float = 3**-0.5,
) -> Tensor:
    """The frozen `lora_A` of the next branch: the leading directions of the new inputs inside the free space of `memory`.

    Rows are orthonormal up to `scale` and orthogonal to everything `memory` protects. Where the free space, or the covariance within it,
    has fewer than `rank` dimensions, the missing rows are exactly zero and a `MissingDirectionsWarning` says how many.

    Args:
        covariance: (dim, dim) second moment of the new task's inputs, any float type and device.
        memory: what earlier tasks protect.
        rank: number of rows.
        decomposition: "PC" takes the left singular vectors of P C, as the reference implementation does; "PCP" the eigenvectors of
            P C P, i.e. the principal directions of the projected inputs, as in the paper. Equal for a fresh memory.
        scale: norm of every row. 1/sqrt(3) is the expected norm of a row of LoRA's usual random initialisation, so that usual learning
            rates fit; the paper has 1.

    Returns:
        (rank, dim), on the covariance's device, in its dtype or float32, whichever is wider.

    Raises:
        ValueError: if `rank` lies outside 1..dim, `decomposition` is unknown, or the covariance has another shape or is not finite.
    """
    if not 1 <= rank <= memory.dim:
        raise ValueError(f"method.rank={rank} does not fit a layer with {memory.dim} inputs; choose 1..{memory.dim}")
    if decomposition not in ("PC", "PCP"):
        raise ValueError(f"method.decomposition={decomposition} is unknown; choose PC or PCP")
    moment, two_sided = _Moment.of(covariance, memory.dim), decomposition == "PCP"
    directions = None
    if 4 * rank <= memory.dim - memory.dimension:
        directions = _leading(moment, memory, lambda values: len(values) >= rank, two_sided=two_sided)
    if directions is None:
        directions = _all(moment, memory.free_basis(), two_sided=two_sided)
    found = min(rank, int((directions.values > moment.rounding).sum()))
    if found < rank:
        warnings.warn(
            f"only {found} of the {rank} rows of lora_A have a direction left ({memory.dim - memory.dimension} of {memory.dim} dimensions "
            f"are free); the other {rank - found} are zero",
            MissingDirectionsWarning,
            stacklevel=2,
        )
    lora_A = torch.zeros(rank, memory.dim, dtype=torch.float64)
    lora_A[:found] = scale * directions.vectors(found).mT
    return lora_A.to(torch.promote_types(covariance.dtype, torch.float32)).to(covariance.device)


def _on_cpu(covariance: Tensor, dim: int) -> Tensor:
    """The covariance on the CPU, in its own type or float32, whichever is wider."""
    if covariance.shape != (dim, dim):
        raise ValueError(f"the covariance has shape {tuple(covariance.shape)}; a layer with {dim} inputs needs ({dim}, {dim})")
    return covariance.detach().cpu().to(torch.promote_types(covariance.dtype, torch.float32))


class _Moment(NamedTuple):
    """A covariance to be decomposed.

    Attributes:
        C: (dim, dim) float64 on the CPU, exactly symmetric.
        norm: its Frobenius norm; between the largest singular value S_0 and sqrt(dim) S_0, and almost free.
        rounding: the size up to which singular values are rounding: dim times float64's epsilon, relative to the norm of C itself, since
            what is left of C after a projection may be nothing but rounding. A covariance that arrives in float32 carries rounding of its
            own: up to 0.4 of that type's epsilon was seen for rank-deficient products, so ten times that is cut.
    """

    C: Tensor
    norm: float
    rounding: float

    @classmethod
    def of(cls, covariance: Tensor, dim: int) -> "_Moment":
        C = _on_cpu(covariance, dim)
        C = (C + C.mT).double().div_(2)  # added before it is made wide: less than half the time, and within `rounding`
        norm = C.norm(dim=1).norm().item()  # row by row: one long sum would lose digits that decide near-ties
        if not math.isfinite(norm):
            raise ValueError("the covariance holds NaN or infinity: the layer's inputs have diverged; lower optimizer.lr or check the data")
        return cls(C, norm, norm * max(dim * torch.finfo(torch.float64).eps, 4 * torch.finfo(covariance.dtype).eps))

    @property
    def may_be_squared(self) -> bool:
        """Whether the square of C loses only what is rounding."""
        return self.rounding > _SQUARE_LOSES * self.norm


class _Directions(NamedTuple):
    """Left singular vectors and values of P C, or eigenvectors and -values of P C P: all of the free space's, or the leading ones.

    Attributes:
        values: (n,) descending. Those up to the covariance's rounding mean nothing.
        coordinates: (f, n), the vectors in `frame`.
        frame: (dim, f) orthonormal columns; None where the coordinates are those of the layer.
    """

    values: Tensor
    coordinates: Tensor
    frame: Tensor | None = None

    def vectors(self, count: int) -> Tensor:
        """(dim, count): the leading ones."""
        leading = self.coordinates[:, :count]
        return leading if self.frame is None else self.frame @ leading


def _all(moment: _Moment, free: Tensor, *, two_sided: bool) -> _Directions:
    """All directions of the space that `free` (dim, f) spans.

    When the whole space is free, the two problems have the same vectors, and the symmetric one is cheaper.
    """
    part = free.mT @ moment.C
    if two_sided or free.shape[1] == len(free):
        values, vectors = torch.linalg.eigh(part @ free)
        return _Directions(values.flip(0).clamp(min=0), vectors.flip(1), free)
    if moment.may_be_squared:
        squares, vectors = torch.linalg.eigh(part @ part.mT)
        return _Directions(squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1), free)
    vectors, values, _ = torch.linalg.svd(part, full_matrices=False)
    return _Directions(values, vectors, free)


def _leading(moment: _Moment, memory: DualGPM, is_enough: Callable[[Tensor], bool], *, two_sided: bool) -> _Directions | None:
    """Leading directions by block Lanczos iterations, until `is_enough` of their values; None where a whole decomposition would pay.

    The space that the iterations span grows from a random block X to X, A X, A^2 X ... (A = P C^2 P, or P C P), always with an orthonormal
    basis Q, and the eigenvectors of Q^T A Q approach the outer ones of A. One counts as found, if all before it do, once its residual is a
    hundredth of what the rounding of C does to it.

    Source: Golub & Underwood 1977, with full orthogonalisation.
    """
    C, num_free = moment.C, memory.dim - memory.dimension
    squared, limit = not two_sided and memory.dimension > 0, num_free // 3
    if num_free < _WIDE or (squared and not moment.may_be_squared):
        return None
    basis, is_free = memory.basis, memory.kind == "retain"

    def into_free(x: Tensor) -> Tensor:
        inside = basis @ (basis.mT @ x)
        return inside if is_free else x - inside

    negligible = memory.dim * torch.finfo(C.dtype).eps * moment.norm ** (2 if squared else 1)
    Q, H = C.new_empty(limit, memory.dim).mT, C.new_zeros(limit, limit)
    # Any start will do that has nothing to do with C; a fixed one makes runs repeatable.
    start = torch.randn(memory.dim, _BLOCK, dtype=C.dtype, generator=torch.Generator().manual_seed(7723591))
    X, size, next_look = torch.linalg.qr(into_free(start)).Q, 0, 2 * _BLOCK
    while size + _BLOCK <= limit:
        new = slice(size, size + _BLOCK)
        size = new.stop
        Q[:, new] = X
        span = Q[:, :size]
        Z = into_free(C @ (C @ X) if squared else C @ X)
        H[:size, new] = span.mT @ Z
        X, R = torch.linalg.qr(torch.addmm(Z, span, H[:size, new], alpha=-1))
        if R.diagonal().abs().min() <= negligible:
            return None  # some of the block is noise from here on
        X = torch.linalg.qr(into_free(torch.addmm(X, span, span.mT @ X, alpha=-1))).Q
        if size < next_look and size + _BLOCK <= limit:
            continue

        next_look = 1.4 * size  # a look is a decomposition too
        eigenvalues, vectors = (found.flip(-1) for found in torch.linalg.eigh(H[:size, :size], UPLO="U"))
        values = eigenvalues.clamp(min=0).sqrt() if squared else eigenvalues.clamp(min=0)
        accepted = 0.01 * moment.rounding * (values.clamp(min=moment.rounding) if squared else 1)
        is_found = (R @ vectors[new]).norm(dim=0) <= accepted
        count = int(is_found.cumprod(0).sum())
        if is_enough(values[:count]):
            # No more than _BLOCK directions of one and the same value can be seen.
            ends = values[_BLOCK - 1 : count]
            if ((values[: len(ends)] - ends <= moment.rounding) & (ends > moment.rounding)).any():
                return None
            return _Directions(values[:count], torch.linalg.qr(into_free(span @ vectors[:, :count])).Q)
    return None


def _no_reduction(tensor: Tensor) -> Tensor:
    return tensor


class CovarianceAccumulator:
    """Collects the second moments of the inputs of several linear layers while the model runs.

        with CovarianceAccumulator(layers) as moments, torch.no_grad():
            for x, _ in batches:
                model(x)
        C = moments.covariance("blocks.0.attn.qkv")

    Every token counts once, so the result does not depend on how the data is cut into batches; empty batches are fine. Products of 1024
    tokens are taken in float32 (float64 for float64 models), also under autocast or with TF32 switched on, and summed in float64 where
    the device has it, all on the layer's device. Layers that are called one after the other on the same tensor share one sum. Forward hooks
    are used: run the model itself, not a compiled graph of it.

    Args:
        layers: name -> layer whose first argument is (..., in_features); anything with `in_features` and `weight`.
        reduce: returns the sum of a tensor over all processes (it may work in place). Called twice per `covariance`, so every process
            has to ask for the same names in the same order.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], *, reduce: Callable[[Tensor], Tensor] = _no_reduction) -> None:
        self._layers = layers
        self._reduce = reduce
        self._sums = {name: _zeros(layer) for name, layer in layers.items()}
        self._tokens = dict.fromkeys(layers, 0)
        self._source: dict[str, str] = {}  # name -> the layer whose sum it shares (itself, mostly)
        self._last: tuple[str, Callable[[], Tensor | None], int | None] | None = None  # previous call: layer, its input, its version
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "CovarianceAccumulator":
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._add, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._last = None

    def covariance(self, name: str) -> Tensor:
        """(in_features, in_features): the mean of h h^T over all tokens of all processes, on the layer's device.

        In float32, the precision of the products, so that `DualGPM` knows what to trust (float64 for float64 models).

        Raises:
            ValueError: if no token reached the layer.
        """
        source = self._source.get(name, name)
        total = self._sums[source]
        tokens = self._reduce(total.new_tensor(float(self._tokens[source])))
        total = self._reduce(total.clone())
        if tokens == 0:
            raise ValueError(f"no input reached {name} while its covariance was collected; run the uncompiled model on at least one image")
        return (total / tokens).to(_product_dtype(self._layers[name]))

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h = inputs[0]
        version = None if h.is_inference() else h._version  # tells a tensor from itself after an in-place change
        source = name
        if self._last is not None and self._last[1]() is h and self._last[2] == version:
            source = self._source[self._last[0]]
        if self._source.setdefault(name, source) != source:
            raise RuntimeError(f"{name} shared its input with another layer in one batch and not in another; collect it on its own")
        self._last = (name, weakref.ref(h), version)  # weak: the activations must be free to go
        if source != name:
            return
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False), _full_float32_products():
            tokens = h.reshape(-1, h.shape[-1]).to(_product_dtype(self._layers[name]))
            _add_products(self._sums[name], tokens)
        self._tokens[name] += len(tokens)


def _add_products(total: Tensor, tokens: Tensor) -> None:
    """Adds tokens^T tokens, (n, dim) -> (dim, dim), in products of at most _CHUNK tokens."""
    if tokens.device.type == "cpu":
        for chunk in tokens.split(_CHUNK):
            total += chunk.mT @ chunk
    else:
        total += _batched_products(tokens).sum(0, dtype=total.dtype)


def _batched_products(tokens: Tensor) -> Tensor:
    """(n, dim) -> (chunks, dim, dim) in one call, as a GPU wants it: each product alone is too small to fill one."""
    chunks = max(1, -(-len(tokens) // _CHUNK))
    tokens = F.pad(tokens, (0, 0, 0, -len(tokens) % chunks))  # zeros add nothing
    chunked = tokens.view(chunks, -1, tokens.shape[1])
    return chunked.mT @ chunked


def _product_dtype(layer: nn.Linear) -> torch.dtype:
    return torch.promote_types(layer.weight.dtype, torch.float32)


def _zeros(layer: nn.Linear) -> Tensor:
    device = layer.weight.device
    return torch.zeros(
        layer.in_features,
        layer.in_features,
        device=device,
        dtype=torch.float32 if device.type == "mps" else torch.float64,  # mps has no float64
    )


@contextmanager
def _full_float32_products():
    """Switch TF32 and its kin off: their products have ten bits."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
