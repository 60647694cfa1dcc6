"""Subspaces: the rules on spectra made by hand, properties over many random streams, and two independent references."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inflora import subspace
from inflora.subspace import CovarianceAccumulator, DualGPM, MissingDirectionsWarning, design_branch, threshold_at

GOLDEN = Path(__file__).parent / "golden"
many_streams = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def second_moment(seed: int, dim: int, *, rank: int | None = None, decay: float = 0.5) -> Tensor:
    """(dim, dim) float64: `rank` random directions with a power-law spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rank = dim if rank is None else rank
    directions = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64)).Q
    weights = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay * (0.5 + torch.rand(rank, generator=generator, dtype=torch.float64))
    return (directions * weights) @ directions.mT


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def remembering(columns: Tensor, kind: str, **options: Any) -> DualGPM:
    """A memory whose stored basis spans the given columns."""
    memory = DualGPM(columns.shape[0], **options)
    memory.load_state_dict({**memory.state_dict(), "kind": kind, "basis": torch.linalg.qr(columns.double()).Q})
    return memory


def axes(dim: int, *indices: int) -> Tensor:
    return torch.eye(dim, dtype=torch.float64)[:, list(indices)]


def protected(memory: DualGPM) -> Tensor:
    """Projector on the protected space."""
    projector = memory.basis @ memory.basis.mT
    return projector if memory.kind == "remove" else torch.eye(memory.dim, dtype=torch.float64) - projector


def protected_axes(memory: DualGPM) -> list[int]:
    """For diagonal covariances: which coordinates are protected."""
    projector = protected(memory)
    assert torch.allclose(projector, projector.diagonal().round().diag(), atol=1e-12)
    return projector.diagonal().round().nonzero().flatten().tolist()


def largest_angle(first: Tensor, second: Tensor) -> float:
    """Largest principal angle in rad between the spans of two matrices' columns; by sines, which small angles need."""
    first, second = (torch.linalg.qr(columns.double()).Q for columns in (first, second))
    assert first.shape == second.shape
    return torch.linalg.matrix_norm(first - second @ (second.mT @ first), 2).clamp(max=1).asin().item()


# ---- the schedule of thresholds ----


def test_threshold_rises_linearly_and_never_reaches_its_end() -> None:
    values = [threshold_at(t, 10, 0.95, 1.0) for t in range(13)]
    assert values == pytest.approx([0.95 + 0.005 * t for t in range(10)] + [0.995] * 3, abs=1e-15)


def test_threshold_refuses_what_is_no_fraction() -> None:
    with pytest.raises(ValueError, match=r"method\.threshold=1\.2 is not a fraction of energy; choose a number from 0 to 1"):
        threshold_at(0, 5, 1.2, 1.0)
    with pytest.raises(ValueError, match=r"method\.threshold_end=-1 "):
        threshold_at(0, 5, 0.9, -1)
    with pytest.raises(ValueError, match="num_tasks=0 leaves nothing"):
        threshold_at(0, 0, 0.9, 1.0)


# ---- edges of the memory ----


def test_fresh_memory() -> None:
    memory = DualGPM(5)
    assert (memory.kind, memory.dimension, memory.basis.shape) == ("remove", 0, (5, 0))
    assert memory.basis.dtype == torch.float64
    C = second_moment(0, 5)
    assert torch.equal(memory.project(C), C)


@pytest.mark.parametrize("energy", ["gram", "input"])
def test_covariance_of_zeros_changes_nothing(energy: Any) -> None:
    memory = DualGPM(4, energy=energy)
    memory.update(torch.zeros(4, 4), 0.9)
    assert (memory.kind, memory.dimension) == ("remove", 0)
    memory.update(diagonal(3, 2, 1, 1), 0.9)  # still by the rule of a first task
    fresh = DualGPM(4, energy=energy)
    fresh.update(diagonal(3, 2, 1, 1), 0.9)
    assert protected_axes(memory) == protected_axes(fresh)
    before = memory.basis.clone()
    memory.update(torch.zeros(4, 4), 1.0)
    assert torch.equal(memory.basis, before)


def test_one_dimension() -> None:
    memory = DualGPM(1)
    memory.update(diagonal(2.0), 0.5)
    assert (memory.kind, memory.dimension, memory.basis.shape) == ("retain", 1, (1, 0))
    assert memory.project(diagonal(2.0)).item() == 0


@pytest.mark.parametrize(("energy", "expected"), [("gram", 3), ("input", 4)])
def test_threshold_one_protects_everything_above_rounding(energy: Any, expected: int) -> None:
    # The first update with "gram" keeps the directions *before* which energy is still missing: one fewer than the rank.
    memory = DualGPM(9, energy=energy)
    C = second_moment(3, 9, rank=4, decay=2.0)
    memory.update(C, 1.0)
    assert memory.dimension == expected
    memory.update(C, 1.0)
    assert memory.dimension == 4
    assert (memory.project(C).norm() / C.norm()).item() < 1e-14


# ---- the rules, on spectra made by hand: squares 16, 4, 4, 1 (sum 25) for "gram", 16, 4, 4, 1 themselves for "input" ----


@pytest.mark.parametrize(
    ("threshold", "gram", "inputs"),
    [
        (0.0, 1, 1),
        (0.5, 1, 1),  # gram: none strictly below, but at least one
        (0.64, 1, 1),  # a tie: one direction holds exactly 0.64
        (0.65, 1, 2),
        (0.8, 1, 2),  # a tie
        (0.81, 2, 3),
        (0.96, 2, 3),  # a tie
        (0.97, 3, 4),
        (1.0, 3, 4),
    ],
)
def test_first_task(threshold: float, gram: int, inputs: int) -> None:
    cases: list[Any] = [("gram", (1, 4, 2, 2), gram), ("input", (1, 16, 4, 4), inputs)]
    for energy, values, expected in cases:
        memory = DualGPM(20, energy=energy)
        memory.update(torch.block_diag(diagonal(*values), torch.zeros(16, 16, dtype=torch.float64)), threshold)
        assert (memory.kind, memory.dimension) == ("remove", expected), energy
        assert protected(memory)[1, 1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("threshold", "removed", "retained"),
    [
        (0.3, [0], [0]),  # enough is protected already: nothing is added
        (0.64, [0], [0, 1]),  # a tie: "remove" stops at equality, "retain" goes on
        (0.65, [0, 1], [0, 1]),
        (0.8, [0, 1], [0, 1, 2]),  # a tie
        (0.81, [0, 1, 2], [0, 1, 2]),
        (0.97, [0, 1, 2, 3], [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3], [0, 1, 2, 3]),  # null directions stay free
    ],
)
def test_later_tasks(threshold: float, removed: list[int], retained: list[int]) -> None:
    for energy, values in (("gram", (4, 2 + 2e-12, 2, 1)), ("input", (16, 4 + 2e-12, 4, 1))):  # the tiny step orders two equal values
        C = torch.block_diag(diagonal(*values), torch.zeros(4, 4, dtype=torch.float64))
        remove = remembering(axes(8, 0), "remove", energy=energy, dual=False)
        remove.update(C, threshold)
        assert (remove.kind, protected_axes(remove)) == ("remove", removed), energy
        retain = remembering(axes(8, 1, 2, 3, 4, 5, 6, 7), "retain", energy=energy)
        retain.update(C, threshold)
        assert (retain.kind, protected_axes(retain)) == ("retain", retained), energy


def test_input_energy_is_measured_on_both_sides_of_the_projector() -> None:
    # With C = [[1, 1], [1, 2]] and the first axis protected, P C P = diag(0, 2) misses 2 of trace 3; the singular value of P C is sqrt 5.
    C = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    for threshold, expected in ((1 / 3 - 0.01, 1), (1 / 3 + 0.01, 2)):
        memory = remembering(axes(2, 0), "remove", energy="input", dual=False)
        memory.update(C, threshold)
        assert memory.dimension == expected


# ---- the switch ----


@pytest.mark.parametrize(("dim", "values", "kind"), [(8, 5, "retain"), (9, 5, "remove"), (7, 5, "retain")])
def test_first_task_switches_from_half_the_dimension_on(dim: int, values: int, kind: str) -> None:
    # Five equal values of which "gram" keeps four: exactly half of 8, less than half of 9, more than half of 7.
    memory = DualGPM(dim)
    memory.update(diagonal(*[1.0] * values, *[0.0] * (dim - values)), 0.99)
    assert (memory.kind, memory.dimension) == (kind, 4)
    assert memory.basis.shape == (dim, 4 if kind == "remove" else dim - 4)


def test_first_task_beyond_half_stores_the_free_space() -> None:
    memory = DualGPM(6)
    memory.update(diagonal(9, 8, 7, 6, 1, 0.5), 0.998)
    assert (memory.kind, protected_axes(memory)) == ("retain", [0, 1, 2, 3])
    assert torch.allclose(memory.project(torch.eye(6)), torch.diag(torch.tensor([0, 0, 0, 0, 1.0, 1.0])), atol=1e-12)


def test_later_tasks_switch_only_beyond_half() -> None:
    memory = DualGPM(6)
    memory.update(diagonal(5, 1, 0, 0, 0, 0), 0.9)
    memory.update(diagonal(0, 0, 5, 4, 0, 0), 1.0)
    assert (memory.kind, memory.dimension) == ("remove", 3)
    memory.update(diagonal(0, 0, 0, 0, 5, 0), 1.0)
    assert (memory.kind, memory.dimension, memory.basis.shape) == ("retain", 4, (6, 2))
    memory.update(diagonal(0, 5, 0, 0, 0, 0), 1.0)
    assert (memory.kind, protected_axes(memory)) == ("retain", [0, 1, 2, 3, 4])


@many_streams
@given(seed=st.integers(0, 10_000), dim=st.integers(2, 24), energy=st.sampled_from(["gram", "input"]))
def test_both_forms_protect_the_same_space(seed: int, dim: int, energy: Any) -> None:
    dual, plain = DualGPM(dim, energy=energy), DualGPM(dim, energy=energy, dual=False)
    for task in range(4):
        C = second_moment(seed + task, dim)
        dual.update(C, 0.9)
        plain.update(C, 0.9)
        assert plain.kind == "remove"
        assert dual.kind == "remove" or dual.basis.shape[1] <= dim / 2
        assert dual.dimension == plain.dimension
        assert torch.allclose(protected(dual), protected(plain), atol=1e-9)


# ---- properties ----


@many_streams
@given(
    seed=st.integers(0, 10_000),
    dim=st.integers(1, 24),
    decay=st.floats(0, 3),
    threshold=st.floats(0.05, 0.999),
    energy=st.sampled_from(["gram", "input"]),
    dual=st.booleans(),
)
def test_memory_grows_and_captures_what_was_asked(seed: int, dim: int, decay: float, threshold: float, energy: Any, dual: bool) -> None:
    memory, earlier = DualGPM(dim, energy=energy, dual=dual), torch.zeros(dim, dim, dtype=torch.float64)
    for task in range(4):
        C = second_moment(seed + task, dim, decay=decay, rank=1 + (seed + task) % dim)
        memory.update(C, threshold)
        now, k = protected(memory), memory.basis.shape[1]
        assert torch.allclose(memory.basis.mT @ memory.basis, torch.eye(k, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(now @ earlier, earlier, atol=1e-9)  # what was protected stays so
        assert now.trace().item() == pytest.approx(memory.dimension, abs=1e-9)
        free = torch.eye(dim, dtype=torch.float64) - now
        assert torch.allclose(memory.project(C), free @ C, atol=1e-12)
        missed = (free @ C).norm() ** 2 / C.norm() ** 2 if energy == "gram" else (free @ C @ free).trace() / C.trace()
        if task or energy == "input":
            assert missed <= 1 - threshold + 1e-9
        elif memory.dimension > 1:  # the reference stops one direction short at the first task
            assert missed > 1 - threshold - 1e-9
        earlier = now


def test_scale_and_dtype_of_the_covariance_do_not_matter() -> None:
    memories = []
    for convert in (lambda C: C, lambda C: 1e8 * C, lambda C: 1e-8 * C, Tensor.float, Tensor.bfloat16):
        memory = DualGPM(16)
        for task in range(3):
            memory.update(convert(second_moment(task, 16, decay=1.0)), 0.9)
        memories.append(memory)
    for other, tolerance in zip(memories[1:], (1e-9, 1e-9, 1e-5, 0.1), strict=True):
        assert other.dimension == memories[0].dimension
        assert torch.allclose(protected(other), protected(memories[0]), atol=tolerance)


@pytest.mark.parametrize("energy", ["gram", "input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dual", [True, False])
def test_rank_deficient_covariance_never_brings_null_directions(energy: Any, dtype: torch.dtype, dual: bool) -> None:
    dim, rank = 24, 7
    memory = DualGPM(dim, energy=energy, dual=dual)
    seen = []
    for task in range(3):
        generator = torch.Generator().manual_seed(task)
        tokens = torch.randn(500, rank, generator=generator, dtype=dtype) @ torch.randn(rank, dim, generator=generator, dtype=dtype)
        seen.append(tokens[:rank])
        memory.update(tokens.mT @ tokens / 500, 1.0)  # in float32, its null directions carry 1e-8 of its norm
        span = torch.linalg.qr(torch.cat(seen).double().mT).Q
        assert memory.dimension <= rank * (task + 1)
        outside = protected(memory) - span @ (span.mT @ protected(memory))
        assert outside.norm() < (1e-9 if dtype == torch.float64 else 1e-4)


def test_what_lies_in_the_protected_space_adds_nothing() -> None:
    for kind, columns in (("remove", (0, 1, 2)), ("retain", (3, 4, 5))):
        rotation = torch.linalg.qr(second_moment(1, 6)).Q
        memory = remembering(rotation[:, list(columns)], kind, dual=False)
        memory.update(rotation @ diagonal(3, 2, 1, 0, 0, 0) @ rotation.mT, 1.0)
        assert memory.dimension == 3


@pytest.mark.parametrize("kind", ["remove", "retain"])
def test_an_update_that_adds_nothing_leaves_the_very_same_basis(kind: str) -> None:
    memory = remembering(torch.linalg.qr(second_moment(1, 8)).Q[:, :4], kind)
    before = memory.basis.clone()
    memory.update(second_moment(2, 8), 0.0)
    assert torch.equal(memory.basis, before)


def test_earlier_directions_stay_the_first_columns() -> None:
    memory = DualGPM(10, dual=False)
    for task in range(3):
        before = memory.basis.clone()
        memory.update(second_moment(task, 10), 0.8)
        assert torch.allclose(memory.basis[:, : before.shape[1]], before, atol=1e-13)


@pytest.mark.parametrize("kind", ["remove", "retain"])
def test_rounding_in_a_basis_does_not_survive_an_update(kind: str) -> None:
    columns = torch.linalg.qr(second_moment(1, 12)).Q[:, :4]
    memory = remembering(columns if kind == "remove" else torch.linalg.qr(columns, mode="complete").Q[:, 4:], kind, dual=False)
    memory.basis = memory.basis.float().double()
    memory.update(second_moment(2, 12), 0.999)
    gram = memory.basis.mT @ memory.basis
    assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-14)


def test_both_triangles_of_a_covariance_count_alike() -> None:
    C = second_moment(0, 8)
    C[0, 5] += 1e-2
    memories = [DualGPM(8) for _ in range(3)]
    for memory, given_covariance in zip(memories, (C, C.mT, (C + C.mT) / 2), strict=True):
        memory.update(given_covariance, 0.7)
        assert torch.allclose(protected(memory), protected(memories[0]), atol=1e-12)


def test_full_memory_stays_as_it_is() -> None:
    for memory in (remembering(torch.eye(5), "remove", dual=False), remembering(torch.zeros(5, 0), "retain")):
        memory.update(second_moment(0, 5), 1.0)
        assert memory.dimension == 5
        assert memory.project(second_moment(1, 5)).abs().max() < 1e-15


def test_projection_keeps_dtype() -> None:
    memory = remembering(axes(3, 0), "remove")
    assert memory.project(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_saved_memory_continues_exactly() -> None:
    cases: list[Any] = [("gram", True), ("input", False)]
    for energy, dual in cases:
        memory = DualGPM(10, energy=energy, dual=dual)
        for task in range(2):
            memory.update(second_moment(task, 10), 0.9)
        state = memory.state_dict()
        tensor = state.pop("basis")
        assert tensor.is_contiguous()
        restored = DualGPM(10, energy=energy, dual=dual)
        restored.load_state_dict({"basis": tensor, **json.loads(json.dumps(state))})
        for either in (memory, restored):
            either.update(second_moment(2, 10), 0.95)
        assert torch.equal(memory.basis, restored.basis)
        assert memory.kind == restored.kind


def test_saved_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the saved memory has energy=input, this one has energy=gram; use the saved value"):
        DualGPM(4).load_state_dict(DualGPM(4, energy="input").state_dict())
    with pytest.raises(ValueError, match="dim=5"):
        DualGPM(4).load_state_dict(DualGPM(5).state_dict())


def test_wrong_arguments_of_the_memory() -> None:
    with pytest.raises(ValueError, match=r"method\.energy=grams is unknown; choose gram or input"):
        DualGPM(4, energy="grams")  # type: ignore[arg-type]
    memory = DualGPM(4)
    with pytest.raises(ValueError, match=r"threshold=1\.5 is not a fraction of energy"):
        memory.update(torch.eye(4), 1.5)
    with pytest.raises(ValueError, match=r"the covariance has shape \(3, 3\); a layer with 4 inputs needs \(4, 4\)"):
        memory.update(torch.eye(3), 0.9)
    for value in (torch.nan, torch.inf, 3e38):  # the sum of two entries as large as the last one is no longer finite
        with pytest.raises(ValueError, match="the covariance holds NaN or infinity"):
            memory.update(torch.full((4, 4), value), 0.9)


def test_a_covariance_that_is_nothing_but_rounding_protects_nothing() -> None:
    """The norm of many equal values is so much larger than each that a coarse type cannot tell them from its rounding."""
    memory = DualGPM(1024)
    memory.update(torch.eye(1024).bfloat16(), 0.9)
    assert memory.dimension == 0


# ---- the design ----


def memories(seed: int, dim: int, dimension: int) -> list[DualGPM]:
    """The same random protected space, stored both ways."""
    basis = torch.linalg.qr(second_moment(seed + 1000, dim)).Q
    return [remembering(basis[:, :dimension], "remove", dual=False), remembering(basis[:, dimension:], "retain")]


@many_streams
@given(seed=st.integers(0, 10_000), dim=st.integers(2, 24), data=st.data(), decomposition=st.sampled_from(["PC", "PCP"]))
def test_design_is_the_leading_part_of_the_new_inputs_outside_the_memory(
    seed: int, dim: int, data: st.DataObject, decomposition: Any
) -> None:
    dimension = data.draw(st.integers(0, dim - 1))
    rank = data.draw(st.integers(1, dim - dimension))
    C = second_moment(seed, dim)
    both = []
    for memory in memories(seed, dim, dimension):
        lora_A = design_branch(C, memory, rank, decomposition=decomposition, scale=0.5)
        assert (lora_A.shape, lora_A.dtype) == ((rank, dim), torch.float64)
        assert torch.allclose(lora_A @ lora_A.mT, 0.25 * torch.eye(rank, dtype=torch.float64), atol=1e-12)
        assert (lora_A @ protected(memory)).abs().max() < 1e-12

        P = torch.eye(dim, dtype=torch.float64) - protected(memory)
        U, S, _ = torch.linalg.svd(P @ C if decomposition == "PC" else P @ C @ P)  # dense, as in the paper and the reference
        if rank == dim or S[rank - 1] - S[rank] > 1e-3:
            assert largest_angle(lora_A.mT, U[:, :rank]) < 1e-9
        both.append(lora_A.mT @ lora_A)
    assert torch.allclose(both[0], both[1], atol=1e-9)


def test_decompositions_agree_only_for_a_fresh_memory() -> None:
    C = second_moment(0, 12)
    rows = [design_branch(C, DualGPM(12), 3, decomposition=decomposition).mT for decomposition in ("PC", "PCP")]
    assert largest_angle(*rows) < 1e-9
    memory = memories(0, 12, 5)[0]
    rows = [design_branch(C, memory, 3, decomposition=decomposition).mT for decomposition in ("PC", "PCP")]
    assert 1e-3 < largest_angle(*rows) < 1.0


def test_default_scale_is_the_norm_of_a_row_of_the_usual_initialisation() -> None:
    rows = design_branch(second_moment(0, 300), DualGPM(300), 10)
    usual = nn.Linear(300, 4000, bias=False).weight  # Kaiming-uniform with a = sqrt 5
    assert torch.allclose(rows.norm(dim=1), torch.full((10,), 3**-0.5, dtype=torch.float64))
    assert usual.norm(dim=1).square().mean().sqrt().item() == pytest.approx(3**-0.5, rel=5e-3)


@pytest.mark.parametrize("decomposition", ["PC", "PCP"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("free", [0, 2, 6])
def test_missing_rows_are_exactly_zero(decomposition: Any, dtype: torch.dtype, free: int) -> None:
    for memory in memories(0, 8, 8 - free):
        with pytest.warns(MissingDirectionsWarning) as caught:
            lora_A = design_branch(second_moment(5, 8).to(dtype), memory, 7, decomposition=decomposition)
        assert [str(warning.message) for warning in caught] == [
            f"only {free} of the 7 rows of lora_A have a direction left ({free} of 8 dimensions are free); the other {7 - free} are zero"
        ]
        assert torch.equal(lora_A[free:], torch.zeros(7 - free, 8, dtype=dtype))
        assert torch.allclose(lora_A[:free] @ lora_A[:free].mT, torch.eye(free, dtype=dtype) / 3, atol=1e-6)
        assert (lora_A.double() @ protected(memory)).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dimension", [0, 5])
def test_rank_deficient_covariance_gives_as_many_rows_as_it_has_directions(dtype: torch.dtype, dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, 3, generator=generator, dtype=dtype) @ torch.randn(3, 12, generator=generator, dtype=dtype)
    for memory in memories(0, 12, dimension):
        with pytest.warns(MissingDirectionsWarning, match="only 3 of the 5 rows"):
            lora_A = design_branch(tokens.mT @ tokens / 50, memory, 5)
        assert torch.equal(lora_A[3:], torch.zeros(2, 12, dtype=dtype))


def test_covariance_of_zeros_gives_no_rows() -> None:
    with pytest.warns(MissingDirectionsWarning, match="only 0 of the 2 rows"):
        assert torch.equal(design_branch(torch.zeros(3, 3), DualGPM(3), 2), torch.zeros(2, 3))


def test_design_comes_back_in_float32_or_better() -> None:
    for given_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert design_branch(second_moment(0, 6).to(given_dtype), DualGPM(6), 2).dtype == dtype


def test_wrong_arguments_of_the_design() -> None:
    with pytest.raises(ValueError, match=r"method\.rank=9 does not fit a layer with 8 inputs; choose 1\.\.8"):
        design_branch(torch.eye(8), DualGPM(8), 9)
    with pytest.raises(ValueError, match=r"method\.rank=0 "):
        design_branch(torch.eye(8), DualGPM(8), 0)
    with pytest.raises(ValueError, match=r"method\.decomposition=CP is unknown; choose PC or PCP"):
        design_branch(torch.eye(8), DualGPM(8), 2, decomposition="CP")  # type: ignore[arg-type]


# ---- two references ----


# ---- wide layers: the leading directions by iterations ----


def wide_moment(seed: int, dim: int, copies: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """(dim, dim), steep: singular values 1, 1/2, 1/3 ..., each `copies` times."""
    directions = torch.linalg.qr(second_moment(seed, dim)).Q
    return ((directions / (torch.arange(dim, dtype=torch.float64) // copies + 1)) @ directions.mT).to(dtype)


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("decomposition", ["PC", "PCP"])
@pytest.mark.parametrize("dimension", [0, 40, 200])
def test_design_by_iterations_is_that_of_a_whole_decomposition(
    dimension: int, decomposition: Any, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    C = wide_moment(3, 600, copies)
    for memory in memories(0, 600, dimension) if dimension else [DualGPM(600)]:
        with monkeypatch.context() as patch:
            patch.setattr(subspace, "_all", None)  # would fail
            by_iterations = design_branch(C, memory, 10, decomposition=decomposition, scale=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(subspace, "_WIDE", 1000)
            whole = design_branch(C, memory, 10, decomposition=decomposition, scale=1.0)
        assert largest_angle(by_iterations.mT, whole.mT) < 1e-5  # of float32
        assert torch.allclose(by_iterations @ by_iterations.mT, torch.eye(10), atol=1e-6)
        assert (by_iterations.double() @ protected(memory)).abs().max() < 1e-7


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("kind", ["fresh", "remove", "retain"])
@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.97, 0.99])
def test_update_by_iterations_is_that_of_a_whole_decomposition(
    kind: str, threshold: float, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks in a row, that need few directions or more than iterations are worth."""
    pair = []
    for wide in (320, 1000):
        monkeypatch.setattr(subspace, "_WIDE", wide)
        memory = {"fresh": lambda: [DualGPM(400)], "remove": lambda: memories(0, 400, 30)[:1], "retain": lambda: memories(0, 400, 210)[1:]}
        pair.append(memory[kind]()[0])
        for seed in (3, 4):
            pair[-1].update(wide_moment(seed, 400, copies), threshold)
    assert (pair[0].kind, pair[0].dimension) == (pair[1].kind, pair[1].dimension)
    assert largest_angle(pair[0].basis, pair[1].basis) < 1e-6
    assert torch.allclose(pair[0].basis.mT @ pair[0].basis, torch.eye(pair[0].basis.shape[1], dtype=torch.float64), atol=1e-12)


def test_a_few_directions_of_a_wide_layer_need_no_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_all", None)  # would fail
    memory = DualGPM(400)
    memory.update(wide_moment(0, 400), 0.9)
    memory.update(wide_moment(1, 400), 0.97)
    assert 16 < memory.dimension < 60


@pytest.mark.parametrize("decomposition", ["PC", "PCP"])
def test_iterations_in_float64_are_as_exact_as_a_whole_decomposition(decomposition: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the square, which would lose what a float64 covariance can tell, is left to one."""
    C = wide_moment(3, 600, dtype=torch.float64)
    for memory in [DualGPM(600), *memories(0, 600, 40)]:
        found = design_branch(C, memory, 10, decomposition=decomposition, scale=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(subspace, "_WIDE", 1000)
            whole = design_branch(C, memory, 10, decomposition=decomposition, scale=1.0)
        assert found.dtype == torch.float64 and largest_angle(found.mT, whole.mT) < 1e-11


@pytest.mark.parametrize("kind", ["fresh", "remove"])
def test_more_equal_directions_than_iterations_can_see(kind: str) -> None:
    values = torch.cat([torch.ones(60), torch.full((20,), 0.5), torch.zeros(520)])
    memory = remembering(axes(600, *range(40)), "remove") if kind == "remove" else DualGPM(600)
    learned = memory.dimension
    lora_A = design_branch(torch.diag(values), memory, 15, scale=1.0)
    assert lora_A[:, learned:60].square().sum().item() == pytest.approx(15, abs=1e-4)
    memory.update(torch.diag(values), 61 / values.square().sum().item())
    assert protected(memory).diagonal()[:60].sum().item() == pytest.approx(60)


@pytest.mark.parametrize("dimension", [0, 40])
@pytest.mark.parametrize("rank", [2, 400])
def test_iterations_find_the_same_numbers_again(rank: int, dimension: int) -> None:
    """Also where a covariance of few or of equal values makes them start anew."""
    C = wide_moment(0, 400, copies=400)
    if rank == 2:
        C = second_moment(0, 400, rank=2).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingDirectionsWarning)
        rows = [design_branch(C, memories(0, 400, dimension)[0] if dimension else DualGPM(400), 10) for _ in range(3)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_rounding_that_is_large_beside_what_may_be_left_calls_for_a_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([torch.tensor([1.0, 0.05]), torch.full((100,), 0.02), torch.zeros(298)])
    C = torch.diag(values).bfloat16()
    allowed = 0.035 / float(C.double().square().sum())
    counts = []
    for wide in (320, 1000):
        monkeypatch.setattr(subspace, "_WIDE", wide)
        memory = remembering(axes(400, 399), "remove")
        memory.update(C, 1 - allowed)
        counts.append(memory.dimension)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dimension", [0, 40])
def test_a_wide_layer_whose_inputs_span_little(dimension: int) -> None:
    tokens = second_moment(0, 400)[:50] @ second_moment(1, 400, rank=3)
    for memory in memories(0, 400, dimension) if dimension else [DualGPM(400)]:
        with pytest.warns(MissingDirectionsWarning, match="only 3 of the 5 rows"):
            lora_A = design_branch((tokens.mT @ tokens).float(), memory, 5)
        assert torch.equal(lora_A[3:], torch.zeros(2, 400)) and (lora_A.double() @ protected(memory)).abs().max() < 1e-7
        memory.update(tokens.mT @ tokens, 1 - 1e-5)
        assert memory.dimension in (dimension + 2, dimension + 3)
    with pytest.warns(MissingDirectionsWarning, match="only 0 of the 5 rows"):
        assert torch.equal(design_branch(torch.zeros(400, 400), DualGPM(400), 5), torch.zeros(5, 400))


def golden_script():
    spec = importlib.util.spec_from_file_location("subspace_reference", GOLDEN / "subspace_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = golden_script()
golden = json.loads((GOLDEN / "subspace.json").read_text())


def test_golden_numbers_are_those_of_the_script() -> None:
    for name, tasks in reference.compute().items():
        for fresh, stored in zip(tasks, golden[name], strict=True):
            assert fresh.keys() == stored.keys()
            for key, value in stored.items():
                if isinstance(value, list):
                    assert torch.allclose(torch.tensor(fresh[key]), torch.tensor(value), atol=1e-6), (name, key)
                else:
                    assert fresh[key] == value, (name, key)


@pytest.mark.parametrize("name", golden)
@pytest.mark.filterwarnings("ignore::inflora.subspace.MissingDirectionsWarning")  # some cases run out of directions
def test_memory_and_design_match_the_independent_reference(name: str) -> None:
    case = reference.CASES[name]
    memory = DualGPM(case["dim"], energy=case["energy"], dual=case["dual"])
    probes = torch.from_numpy(reference.probes(case["dim"]))
    for C, threshold, expected in zip(reference.inputs(name), case["thresholds"], golden[name], strict=True):
        C = torch.from_numpy(C)
        for decomposition in ("PC", "PCP"):
            rows = design_branch(C, memory, reference.RANK, decomposition=decomposition, scale=1.0)
            if expected[f"design_{decomposition}"] is not None:
                wanted = torch.tensor(expected[f"design_{decomposition}"], dtype=torch.float64)
                assert torch.allclose(rows.mT @ (rows @ probes), wanted, atol=1e-7)
        memory.update(C, threshold)
        assert (memory.kind, memory.basis.shape[1], memory.dimension) == (expected["kind"], expected["columns"], expected["dimension"])
        assert torch.allclose(protected(memory) @ probes, torch.tensor(expected["protected"], dtype=torch.float64), atol=1e-8)


class PublishedMemory:
    """How the published code behaves: float32 throughout, a dense projector, plain SVDs, no guard; first task below half the space."""

    def __init__(self, dim: int) -> None:
        self.dim, self.mode = dim, "remove"
        self.G = torch.zeros(dim, 0)

    def projector(self) -> Tensor:
        overlap = self.G @ self.G.mT
        return overlap if self.mode == "retain" else torch.eye(self.dim) - overlap

    def design(self, C: Tensor, rank: int) -> Tensor:
        return torch.linalg.svd(self.projector() @ C)[0][:, :rank].mT / 3**0.5

    def update(self, C: Tensor, threshold: float) -> None:
        is_first = self.G.shape[1] == 0
        U, S, _ = torch.linalg.svd(self.projector() @ C)
        share = S**2 / (C**2).sum()
        if is_first:
            self.G = U[:, : max(1, int((share.cumsum(0) < threshold).sum()))]
        elif self.mode == "remove":
            captured, j = 1 - share.sum(), 0
            while captured < threshold:
                captured, j = captured + share[j], j + 1
            self.G = torch.cat([self.G, U[:, :j]], dim=1)
        else:
            left, j = share.sum(), 0
            while left >= 1 - threshold:
                left, j = left - share[j], j + 1
            cut = self.G - U[:, :j] @ (U[:, :j].mT @ self.G)
            self.G = torch.linalg.svd(cut)[0][:, : self.G.shape[1] - j]
        if self.mode == "remove" and self.G.shape[1] > self.dim / 2:
            self.G = torch.linalg.svd(self.G)[0][:, self.G.shape[1] :]
            self.mode = "retain"


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_published_code(seed: int) -> None:
    dim, rank, num_tasks = 64, 10, 8
    generator = torch.Generator().manual_seed(seed)
    ours, published = DualGPM(dim), PublishedMemory(dim)
    common = torch.randn(dim, generator=generator)
    kinds = set()
    for task in range(num_tasks):
        directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        tokens = 0.3 * common + torch.randn(2000, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.4 @ directions
        C = torch.zeros(dim, dim)
        for n, batch in enumerate(tokens.split(100)):  # its running mean over batches
            C = (C * n * 100 + batch.mT @ batch) / (n * 100 + 100)
        threshold = threshold_at(task, num_tasks, 0.99, 1.0)

        assert largest_angle(design_branch(C, ours, rank).mT, published.design(C, rank).mT) < 1e-3
        ours.update(C, threshold)
        published.update(C, threshold)
        assert (ours.kind, ours.basis.shape) == (published.mode, published.G.shape)
        assert largest_angle(ours.basis, published.G) < 1e-3
        kinds.add(ours.kind)
    assert kinds == {"remove", "retain"}


# ---- second moments ----


class Twin(nn.Module):
    """Two layers on one input, one on another."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.key, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.key(x) * self.value(x))


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def mean_outer(h: Tensor) -> Tensor:
    h = h.detach().reshape(-1, h.shape[-1]).double()
    return h.mT @ h / len(h)


@pytest.mark.parametrize("splits", [[40], [1] * 40, [7, 0, 20, 13], [0, 39, 1]])
def test_moments_ignore_how_the_data_is_batched(splits: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Twin(), torch.randn(40, 5, 6)
    with CovarianceAccumulator(layers_of(model)) as moments:
        for batch in x.split(splits):
            model(batch)
    hidden = model.key(x) * model.value(x)
    for name, h in (("key", x), ("value", x), ("out", hidden)):
        C = moments.covariance(name)
        assert C.dtype == torch.float32
        assert torch.allclose(C.double(), mean_outer(h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 7, 1024, 1025, 4160])
def test_products_in_one_call_are_those_of_one_chunk_after_the_other(count: int) -> None:
    tokens = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    total = torch.zeros(6, 6, dtype=torch.float64)
    subspace._add_products(total, tokens)
    batched = subspace._batched_products(tokens)
    assert len(batched) == -(-count // 1024)
    torch.testing.assert_close(batched.sum(0, dtype=torch.float64), total, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(total, tokens.double().mT @ tokens.double(), rtol=1e-6, atol=1e-4)


def test_moments_stop_with_the_context_and_leave_no_hook() -> None:
    model = Twin()
    with CovarianceAccumulator(layers_of(model)) as moments:
        model(torch.ones(2, 6))
    before = moments.covariance("key")
    model(torch.zeros(50, 6))
    assert torch.equal(moments.covariance("key"), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_of_a_float64_model_are_exact() -> None:
    torch.manual_seed(0)
    model, x = Twin().double(), torch.randn(30, 6, dtype=torch.float64)
    with CovarianceAccumulator(layers_of(model)) as moments, torch.inference_mode():
        for batch in x.split(7):
            model(batch)
    assert moments.covariance("key").dtype == torch.float64
    assert torch.allclose(moments.covariance("key"), mean_outer(x), atol=1e-14)


def test_moments_are_full_precision_under_autocast_and_for_half_models() -> None:
    torch.manual_seed(0)
    x = 10 + torch.randn(4000, 6)  # a large mean: products in bfloat16, or sums of them, would lose the variance
    model = Twin()
    with CovarianceAccumulator(layers_of(model)) as moments, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(x)
    assert torch.allclose(moments.covariance("key").double(), mean_outer(x), rtol=1e-5)

    half = Twin().bfloat16()
    with CovarianceAccumulator(layers_of(half)) as moments, torch.no_grad():
        half(x.bfloat16())
    assert moments.covariance("key").dtype == torch.float32
    assert torch.allclose(moments.covariance("key").double(), mean_outer(x.bfloat16()), rtol=1e-5)


def test_moments_of_many_batches_do_not_lose_the_small_ones() -> None:
    # 1e8 + 1 is 1e8 in float32: the sum over batches needs float64.
    layer = nn.Linear(1, 1)
    with CovarianceAccumulator({"layer": layer}) as moments, torch.no_grad():
        for value in [1e4] + [1.0] * 1000:
            layer(torch.full((1, 1), value))
    assert moments.covariance("layer").item() == pytest.approx((1e8 + 1000) / 1001, rel=1e-7)


def test_float32_precision_setting_is_full_inside_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: seen.append(torch.get_float32_matmul_precision()) or real(a, b))
    torch.set_float32_matmul_precision("high")
    try:
        with CovarianceAccumulator({"layer": (layer := nn.Linear(2, 2))}):
            layer(torch.ones(1, 2))
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_layers_on_one_input_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    real = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: products.append(a) or real(a, b))
    model = Twin()
    with CovarianceAccumulator(layers_of(model)), torch.no_grad():
        model(torch.ones(2, 6))
    assert len(products) == 2


def test_an_input_changed_in_place_is_another_input() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(3, 2)
    with CovarianceAccumulator({"first": first, "second": second}) as moments, torch.no_grad():
        first(x)
        second(x.mul_(2))
    assert torch.equal(moments.covariance("second"), 4 * moments.covariance("first"))


def test_sharing_an_input_only_now_and_then_is_refused() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(3, 2)
    with CovarianceAccumulator({"first": first, "second": second}), torch.no_grad():
        first(x)
        second(x)
        first(x)
        with pytest.raises(RuntimeError, match="second shared its input with another layer in one batch and not in another"):
            second(x.clone())


def test_moments_over_several_processes_equal_one() -> None:
    torch.manual_seed(0)
    # In float64: a small entry is a sum of large ones, whose rounding in float32 exceeds the bound on some processors.
    model, x = Twin().double(), torch.randn(30, 6, dtype=torch.float64)
    ranks = []
    for part in (x[:11], x[11:], x[:0], None):  # one process has an empty batch, one has none at all
        with CovarianceAccumulator(layers_of(model)) as moments, torch.no_grad():
            if part is not None:
                model(part)
        ranks.append(moments)

    handed_over: list[list[Tensor]] = [[] for _ in ranks]  # what each process gives to its all-reduce, in order
    for moments, log in zip(ranks, handed_over, strict=True):
        moments._reduce = lambda tensor, log=log: log.append(tensor.clone()) or tensor.fill_(1)
        for name in layers_of(model):
            moments.covariance(name)
    totals = [sum(tensors) for tensors in zip(*handed_over, strict=True)]  # fails if two processes differ in number or shape
    ranks[3]._reduce = lambda tensor: tensor.copy_(totals.pop(0))
    with CovarianceAccumulator(layers_of(model)) as single, torch.no_grad():
        model(x)
    for name in layers_of(model):
        assert torch.allclose(ranks[3].covariance(name), single.covariance(name), rtol=1e-6)


def test_a_layer_that_saw_nothing_is_an_error() -> None:
    model = Twin()
    with CovarianceAccumulator(layers_of(model)) as moments:
        model(torch.ones(0, 6))
    with pytest.raises(ValueError, match="no input reached key while its covariance was collected"):
        moments.covariance("key")
