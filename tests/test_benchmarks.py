"""The benchmark runs, its table is complete, and it notices a fast path that computes something else."""

import json
import math
import time

import pytest
import torch
import toy  # noqa: F401  (makes timm know vit_toy.test)

from benchmarks import pairs, reference
from benchmarks.__main__ import main
from benchmarks.pairs import BACKBONES, PRODUCT_SIZE, Bench, Sizes
from benchmarks.timing import Disagreement, angle, compare, kept_for_backward, missed_energy, timed
from inflora import lora
from inflora.methods import inflora
from inflora.subspace import DualGPM, design_branch

SMALL = Sizes(batch_size=4, images=4, tasks=2, epochs=1, turns=2, run_turns=1, learned=(1,), ranks=(), widths=(), width_image_size=0)


@pytest.fixture(autouse=True)
def toy_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", "vit_toy.test")


def small_bench() -> Bench:
    return Bench(SMALL, backbone="vit_toy.test", pretrained=False, device="cpu", precision="32")


# ---- the command ------------------------------------------------------------------------------------------------------------------


def test_quick_benchmark_writes_a_complete_table(tmp_path, capsys):
    main(["--quick", "--backbone", "toy", "--random", "--out", str(tmp_path)])
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert text in capsys.readouterr().out
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        assert f"| {row['name']} | **{row['ratio']:.2f}** |" in text
        assert row["ratio"] == pytest.approx(row["plain_s"] / row["fast_s"])
        assert row["difference"] <= row["tolerance"]
    assert result["settings"]["backbone"] == "toy" and result["settings"]["precision"] == "32"
    growth = {name: [line[name] for line in table] for name, table in result["growth"].items()}
    assert growth == {"tasks learned": [1, 2], "rank": [2], "width": [192]}
    assert result["limit"]["images_per_second"] > 0 and result["peak_memory_bytes"] > 1e8
    assert 0 < result["limit"]["fraction"] < 1 and f"**{result['limit']['fraction']:.0%}**" in text


def test_a_disagreement_ends_the_benchmark_badly_but_after_all_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora, "merge", lambda model: None)
    with pytest.raises(SystemExit) as ended:
        main(["--quick", "--backbone", "toy", "--random", "--out", str(tmp_path)])
    assert "training step: relative difference of a loss is" in str(ended.value)
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in result["rows"]]
    assert "training step" not in names and "branch design, all layers" in names
    assert str(ended.value) == "\n".join(result["disagreements"])
    assert result["limit"]["operations"] > 0 and result["peak_memory_bytes"] > 0
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| training step |" not in text and f"**The sides disagree**: {result['disagreements'][0]}" in text


def test_what_a_stopped_benchmark_has_measured_is_kept(tmp_path, monkeypatch):
    def stop(bench) -> None:
        raise MemoryError

    monkeypatch.setattr(Bench, "run_row", stop)
    with pytest.raises(MemoryError):
        main(["--quick", "--backbone", "toy", "--random", "--out", str(tmp_path)])
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| training step |" in text and "| evaluation on all tasks |" in text and "The limit" not in text
    assert len(json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]) == 7


def test_operations_of_a_step_are_those_counted_by_hand():
    """Batch 4 of 16 patches and a class token, width 32, two blocks of 12 width^2 weights; 2 operations per weight and token.

    In the second block, all tokens meet the 3 width^2 weights of qkv; only the class tokens ask, and go on to the other 9.
    """
    tokens, dim, rank, patches = 4 * 17, 32, 10, 4 * 16
    weights, last_weights = 2 * tokens * dim * dim, 2 * 4 * dim * dim
    attention, last_attention = 2 * 2 * 4 * 17 * 17 * dim, 2 * 2 * 4 * 17 * dim  # two products; each has two in the backward pass
    lora_A, lora_B, head = 2 * tokens * dim * rank, 2 * tokens * 3 * dim * rank, 2 * 4 * dim * 2
    blocks = (12 * weights + attention) + (3 * weights + 9 * last_weights + last_attention)
    forward = 2 * patches * 48 * dim + blocks + 2 * lora_A + head
    # Towards the inputs of frozen weights, of the first block's qkv excepted; lora_B's own gradient, and in the second block through it.
    towards_inputs = 9 * weights + (3 * weights + 9 * last_weights)
    backward = towards_inputs + 2 * (attention + last_attention) + 2 * lora_B + (lora_B + lora_A) + 2 * head
    assert small_bench().limit()["operations"] == forward + backward


def test_reference_stores_every_branch_and_the_package_only_heads_and_bases(tmp_path):
    bench = small_bench()
    (fast_1, plain_1), (fast_4, plain_4) = (bench.growth(learned)["numbers stored"] for learned in (1, 4))
    head, branch, most_basis = 2 * (32 + 1), 2 * 3 * 10 * 32, 2 * 32 * 16
    assert plain_4 - plain_1 >= 3 * (head + branch)
    assert fast_4 - fast_1 <= 3 * head + most_basis


# ---- what it must notice ------------------------------------------------------------------------------------------------------------


def test_a_branch_that_is_not_merged_is_noticed(monkeypatch):
    small_bench().step_row()
    monkeypatch.setattr(lora, "merge", lambda model: None)
    with pytest.raises(Disagreement, match="training step: relative difference of a loss"):
        small_bench().step_row()


def test_what_a_row_does_reaches_no_other_row():
    bench = small_bench()

    def state() -> list[torch.Tensor]:
        method, plain = bench._twins(1)
        return [
            *method.state_dict()["tensors"].values(),
            *plain.vit.state_dict().values(),
            *(x for a in plain.attentions for x in a.lora_B_k),
        ]

    before = [tensor.clone() for tensor in state()]
    bench.step_row(1)
    assert all(map(torch.equal, before, state()))


def test_a_memory_that_protects_too_much_is_noticed(monkeypatch):
    bench = small_bench()
    honest = DualGPM.update
    monkeypatch.setattr(DualGPM, "update", lambda memory, covariance, threshold: honest(memory, covariance, 0.9999))
    with pytest.raises(Disagreement, match="largest principal angle in rad, dimensions equal is inf"):
        bench.subspace_row(0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda C, memory, rank: design_branch(torch.eye(len(C)), memory, rank),  # in the free space, but not the leading directions
        lambda C, memory, rank: design_branch(C, DualGPM(len(C)), rank),  # the leading directions, protected ones among them
    ],
)
def test_a_later_branch_in_other_directions_is_noticed(wrong, monkeypatch):
    bench = small_bench()
    assert bench.subspace_row(2).difference < 1e-3
    monkeypatch.setattr(pairs, "design_branch", wrong)
    with pytest.raises(Disagreement, match="share of its energy that a branch misses"):
        bench.subspace_row(2, updates=False)


def test_a_first_branch_in_other_directions_is_noticed(monkeypatch):
    bench = small_bench()
    bench.first_step_row()
    monkeypatch.setattr(inflora, "design_branch", lambda C, *_, **__: design_branch(torch.eye(len(C)), DualGPM(len(C)), 10))
    with pytest.raises(Disagreement, match="share of its energy that a branch misses"):
        bench.first_step_row()


def test_other_results_are_refused_and_so_is_nan():
    def difference(value: float):
        return compare("adding", lambda: value, lambda: 1.0, turns=1, measure="difference", distance=lambda a, b: abs(a - b), tolerance=0.5)

    assert difference(1.25).difference == 0.25
    with pytest.raises(Disagreement, match=r"adding: difference is 1, above 0\.5"):
        difference(2.0)
    with pytest.raises(Disagreement, match="adding: difference is nan"):
        difference(math.nan)


def test_the_sides_take_turns_after_a_warm_up():
    calls = []
    row = compare(
        "calls",
        lambda: calls.append("fast"),
        lambda: calls.append("plain"),
        turns=3,
        measure="none",
        distance=lambda a, b: 0.0,
        tolerance=0.0,
    )
    assert calls == ["fast", "plain"] * 4
    assert row.turns == 3 and row.ratio_low <= row.ratio_high


def test_the_warm_up_is_not_part_of_the_times():
    waits = iter([0.3, 0.001])
    row = compare(
        "waiting",
        lambda: time.sleep(next(waits)),
        lambda: None,
        turns=1,
        measure="none",
        distance=lambda a, b: 0.0,
        tolerance=0.0,
    )
    assert row.fast_s < 0.1
    assert row.ratio_low == row.ratio == row.ratio_high


def test_a_device_is_waited_for_before_and_after(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    timed(lambda: calls.append("work"))
    assert calls == ["wait", "work", "wait"]


def test_the_matrix_rate_is_that_of_the_steps_precision(monkeypatch):
    monkeypatch.setitem(PRODUCT_SIZE, "cpu", 48)
    multiply, seen = torch.Tensor.__matmul__, []

    def watched(left, right):
        if left.shape == right.shape == (48, 48):
            seen.append(left.dtype)
        return multiply(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    for precision, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        Bench(SMALL, backbone="vit_toy.test", pretrained=False, device="cpu", precision=precision).limit()
        assert seen and set(seen) == {dtype}
        seen.clear()


# ---- measures -----------------------------------------------------------------------------------------------------------------------


def test_angle_between_subspaces():
    axes = torch.eye(4, dtype=torch.float64)
    tilted = torch.stack([axes[0], math.cos(0.1) * axes[1] + math.sin(0.1) * axes[2]], dim=1)
    assert angle(tilted, axes[:, :2]) == pytest.approx(0.1)
    assert angle(axes[:, [1, 0]] * -2, axes[:, :2]) < 1e-12
    assert angle(axes[:, :1], axes[:, :2]) == math.inf


def test_energy_that_a_span_misses():
    C = torch.diag(torch.tensor([8.0, 1.0, 1.0, 0.1]))
    axes = torch.eye(4)
    assert missed_energy(-3 * axes[[1, 0]], axes[:2], C) < 1e-7
    assert missed_energy(axes[[0, 2]], axes[:2], C) < 1e-7  # another direction, as good
    assert missed_energy(axes[[0, 3]], axes[:2], C) == pytest.approx((0.9 / 9) ** 0.5)
    assert missed_energy(axes[[1, 2]], axes[:2], C) == pytest.approx((7 / 9) ** 0.5)
    assert missed_energy(axes[:3], axes[:2], C) == math.inf


def test_bytes_kept_for_backward_count_a_shared_tensor_once_and_no_weight():
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.randn(7, 10)
    assert kept_for_backward(lambda: linear(x).sum(), linear) == 7 * 10 * 4
    assert kept_for_backward(lambda: (linear(x) + 2 * linear(x)).sum(), linear) == 7 * 10 * 4


# ---- the reference itself, on spectra made by hand -------------------------------------------------------------------------------------


def dimensions_and_kind(memory: reference.Memory) -> tuple[int, str]:
    return memory[1].shape[1], memory[0]


def test_reference_memory_follows_the_published_rules():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05, 0, 0, 0, 0])
    C = torch.diag(shares.sqrt())
    assert dimensions_and_kind(reference.update(None, C, 0.9)) == (2, "remove")  # strictly below: 0.5, 0.8
    assert dimensions_and_kind(reference.update(None, C, 0.1)) == (1, "remove")  # at least one
    memory = reference.update(None, C, 0.9)
    assert reference.update(memory, C, 0.75) is memory
    assert dimensions_and_kind(reference.update(memory, C, 0.9)) == (3, "remove")
    assert dimensions_and_kind(reference.update(memory, C, 0.99)) == (4, "remove")
    switched = reference.update(memory, torch.eye(8), 0.7)  # 2 of 8 captured, 4 more needed: 6 used, 2 free
    assert dimensions_and_kind(switched) == (2, "retain")
    assert reference.project(C, switched).norm() < 1e-6
    assert dimensions_and_kind(reference.update(switched, torch.eye(8), 0.8)) == (1, "retain")


def test_reference_design_is_orthogonal_to_the_memory_with_rows_of_the_scale():
    C = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    memory = ("remove", torch.eye(4)[:, :1])
    expected = torch.tensor([[0.0, 0.5, 0, 0], [0, 0, 0.5, 0]])
    torch.testing.assert_close(reference.design(C, memory, 2, 0.5).abs(), expected)
