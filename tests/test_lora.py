"""The low-rank branch: the same numbers as a dense update, and InfLoRA's claims about what a branch can and cannot change."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import toy
from torch import Tensor, nn

from inflora import lora
from inflora.lora import LowRankLinear
from inflora.subspace import DualGPM, design_branch

KV = lora.kv_rows(8)
LAYOUTS: list[dict[str, Any]] = [
    {"rows": None},
    {"rows": KV},
    {"rows": KV, "share_A": False},
    {"rows": [slice(0, 8), slice(16, 24)]},
    {"rows": [slice(0, 8), slice(16, 24)], "share_A": False},
    {"rows": [slice(3, 5), slice(5, 7), slice(9, 11)]},
    {"rows": [slice(2, 3)]},
]


def tiny_vit(depth: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=5).to(
        dtype
    )


def layer(seed: int = 0, *, rank: int = 3, dtype: torch.dtype = torch.float64, trained: bool = True, **layout: Any) -> LowRankLinear:
    """An (8 -> 24) layer with a branch whose factors are random, as after some training."""
    torch.manual_seed(seed)
    module = LowRankLinear(nn.Linear(8, 24, dtype=dtype), rank, **layout)
    if trained:
        with torch.no_grad():
            module.lora_A.normal_()
            module.lora_B.normal_()
    return module


def dense_delta(module: LowRankLinear) -> Tensor:
    """lora_B lora_A, written out slice by slice."""
    delta = torch.zeros(module.out_features, module.in_features, dtype=module.weight.dtype)
    for index, rows in enumerate(module.rows):
        lora_A = module.lora_A if module.lora_A.dim() == 2 else module.lora_A[index]
        delta[rows.start : rows.stop] = module.lora_B[index] @ lora_A
    return delta


def train_branch(module: nn.Module, lora_Bs: list[nn.Parameter], width: int, *, steps: int = 5, optimizer: Any = torch.optim.Adam) -> None:
    generator = torch.Generator().manual_seed(0)
    step = optimizer(lora_Bs, lr=0.1)
    for _ in range(steps):
        x = torch.randn(6, width, generator=generator, dtype=lora_Bs[0].dtype)
        step.zero_grad()
        module(x).square().mean().backward()
        step.step()


# ---- one layer ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("train_A", [False, True])
def test_forward_and_gradients_equal_a_dense_update(layout: dict[str, Any], train_A: bool) -> None:
    module = layer(**layout, train_A=train_A)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 5, 24, dtype=torch.float64)
    wanted = [x, module.weight, module.lora_B] + ([module.lora_A] if train_A else [])

    low_rank = module(x)
    dense = F.linear(x, module.weight + dense_delta(module), module.bias)
    assert torch.allclose(low_rank, dense, atol=1e-12)
    for ours, expected in zip(torch.autograd.grad(low_rank, wanted, cotangent), torch.autograd.grad(dense, wanted, cotangent), strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_forms_of_the_branch(layout: dict[str, Any]) -> None:
    module = layer(**layout)
    delta = lora.delta_weight(module)
    assert torch.allclose(delta, dense_delta(module), atol=1e-13)
    outside = torch.ones(24, dtype=torch.bool)
    for rows in module.rows:
        outside[rows] = False
    assert torch.equal(delta[outside], torch.zeros_like(delta[outside]))
    effective = lora.effective_weight(module)
    assert torch.allclose(effective, module.weight + dense_delta(module), atol=1e-13)
    assert not effective.requires_grad


def test_delta_weight_is_differentiable() -> None:
    module = layer(rows=KV, train_A=True)
    lora.delta_weight(module).square().sum().backward()
    delta = dense_delta(module).detach()
    assert module.lora_B.grad is not None and module.lora_A.grad is not None
    assert torch.allclose(module.lora_B.grad.flatten(0, 1), 2 * delta[8:] @ module.lora_A.detach().mT)
    assert torch.allclose(module.lora_A.grad, 2 * module.lora_B.detach().flatten(0, 1).mT @ delta[8:])


def test_effective_weight_of_a_plain_layer_is_a_copy() -> None:
    linear = nn.Linear(3, 2)
    weight = lora.effective_weight(linear)
    assert torch.equal(weight, linear.weight)
    assert weight.data_ptr() != linear.weight.data_ptr()
    assert not weight.requires_grad


def test_slices_on_one_lora_A_reduce_the_input_once() -> None:
    lora_B, lora_A = layer(rows=KV).factors()
    assert (lora_B.shape, lora_A.shape) == ((24, 3), (3, 8))
    lora_B, lora_A = layer(rows=KV, share_A=False).factors()
    assert (lora_B.shape, lora_A.shape) == ((24, 6), (6, 8))


def test_a_single_vector_is_one_token() -> None:
    module = layer(rows=KV)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.allclose(module(x[0]), module(x)[0])


def test_a_fresh_branch_changes_nothing_and_does_not_touch_the_random_state() -> None:
    linear = nn.Linear(8, 24)
    x, state = torch.randn(4, 8), torch.get_rng_state()
    module = LowRankLinear(linear, 2, rows=KV)
    assert torch.equal(module(x), linear(x))
    assert module.weight is linear.weight and module.bias is linear.bias
    assert torch.equal(module.lora_A, torch.zeros(2, 8))
    assert [name for name, _ in module.named_buffers()] == ["lora_A"]
    assert torch.equal(torch.get_rng_state(), state)
    assert "lora_A" not in dict(module.named_parameters())
    assert list(LowRankLinear(nn.Linear(8, 24), 2, train_A=True).named_buffers()) == []


def test_layer_without_bias_and_in_evaluation_mode() -> None:
    linear = nn.Linear(8, 24, bias=False).eval()
    module = LowRankLinear(linear, 2)
    assert module.bias is None
    assert not module.training
    assert torch.equal(module(torch.ones(1, 8)), linear(torch.ones(1, 8)))


def test_trained_lora_A_is_drawn_as_lora_does() -> None:
    module = LowRankLinear(nn.Linear(300, 6), 200, train_A=True, generator=torch.Generator().manual_seed(5))
    usual = nn.Linear(300, 200).weight
    assert module.lora_A.abs().max() <= 300**-0.5
    assert module.lora_A.std().item() == pytest.approx(usual.std().item(), rel=0.01)
    assert isinstance(module.lora_A, nn.Parameter)
    assert torch.equal(module.lora_B, torch.zeros(1, 6, 200))

    half = LowRankLinear(nn.Linear(300, 6).bfloat16(), 200, train_A=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(half.lora_A, module.lora_A.bfloat16())
    own = LowRankLinear(nn.Linear(300, 6), 2, rows=[slice(0, 3), slice(3, 6)], share_A=False, train_A=True)
    assert own.lora_A.shape == (2, 2, 300)
    assert 0.9 * 300**-0.5 < own.lora_A.abs().max() <= 300**-0.5  # each slice is drawn for 300 inputs


class Doubled(LowRankLinear):
    """A layer whose branch is more than its trained factors: it counts them twice, once as columns of their own."""

    def sliced_factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_B, self.lora_B], -1), torch.cat([self.lora_A, self.lora_A], -2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_says_its_own_factors_computes_and_merges_them(layout: dict[str, Any]) -> None:
    plain = layer(**layout, train_A=True)
    model = nn.Sequential(nn.Linear(8, 24, dtype=torch.float64))
    (ours,) = lora.inject(model, ["0"], 3, **{"share_A": True} | layout, train_A=True, layer=Doubled).values()
    assert type(ours) is Doubled
    ours.load_state_dict(plain.state_dict())
    expected = plain.weight + 2 * dense_delta(plain)
    x = torch.randn(5, 8, dtype=torch.float64)
    before = ours(x)
    assert torch.allclose(before, F.linear(x, expected, plain.bias), atol=1e-12)
    assert torch.allclose(lora.effective_weight(ours), expected, atol=1e-12)
    assert torch.allclose(lora.delta_weight(ours), 2 * dense_delta(plain), atol=1e-12)
    assert torch.allclose(lora.merged_copy(model)(x), before, atol=1e-12)
    lora.merge(model)
    assert torch.allclose(model(x), before, atol=1e-12)
    assert not lora.delta_weight(ours).any()


def test_a_cleared_branch_is_as_good_as_new() -> None:
    module = layer(rows=KV)
    lora_A = module.lora_A.clone()
    module.clear()
    assert torch.equal(module.lora_A, lora_A) and not module.lora_B.any()


def test_frozen_random_lora_A() -> None:
    module = LowRankLinear(nn.Linear(8, 24), 2)
    module.reset_lora_A(torch.Generator().manual_seed(1))
    first = module.lora_A.clone()
    assert first.abs().max() > 0
    module.reset_lora_A(torch.Generator().manual_seed(1))
    assert torch.equal(module.lora_A, first)
    assert not module.lora_A.requires_grad


def test_set_lora_A_converts_and_checks_the_shape() -> None:
    module = LowRankLinear(nn.Linear(8, 24), 2)
    rows = torch.randn(2, 8, dtype=torch.float64)
    module.set_lora_A(rows)
    assert torch.equal(module.lora_A, rows.float())
    with pytest.raises(AssertionError, match=r"lora_A is \(2, 8\), given \(1, 8\)"):
        module.set_lora_A(rows[:1])


@pytest.mark.parametrize("layout", LAYOUTS[1:3])
def test_compiles_without_graph_breaks(layout: dict[str, Any]) -> None:
    torch.compiler.reset()
    module = layer(**layout)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.allclose(compiled(x), module(x), atol=1e-13)
    (expected,) = torch.autograd.grad(module(x).sin().sum(), [module.lora_B])
    (ours,) = torch.autograd.grad(compiled(x).sin().sum(), [module.lora_B])
    assert torch.allclose(ours, expected, atol=1e-13)


def test_autocast_and_empty_batches() -> None:
    module = layer(rows=KV, dtype=torch.float32)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), module(x), atol=0.2, rtol=0.05)
    output.float().sum().backward()
    assert module.lora_B.grad is not None and module.lora_B.grad.dtype == torch.float32
    assert module(x[:0]).shape == (0, 24)


def test_disabled_branches_leave_the_plain_layer() -> None:
    vit = tiny_vit()
    x = torch.randn(2, 3, 16, 16)
    plain = vit(x)
    for module in lora.inject(vit, lora.qkv_names(vit), 2, rows=lora.kv_rows(16), train_A=True).values():
        module.lora_B.data.normal_()
    adapted = vit(x)
    assert not torch.allclose(adapted, plain)
    with lora.disabled(vit):
        assert torch.equal(vit(x), plain)
        with lora.disabled(vit):
            pass
        assert torch.equal(vit(x), plain), "leaving the inner one ends only what it began"
    assert torch.equal(vit(x), adapted)


def test_deep_copies_are_independent() -> None:
    module = layer(rows=KV)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.lora_B.zero_()
    assert not torch.equal(twin(x), module(x))


def test_printing_names_rank_and_rows() -> None:
    assert "in_features=8, out_features=24, bias=True, rank=3, rows=[8:16, 16:24]" in repr(layer(rows=KV))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [slice(0, 0)],
        [slice(0, 8), slice(8, 10)],  # unequal
        [slice(8, 16), slice(0, 8)],  # descending
        [slice(0, 8), slice(4, 12)],  # overlapping
        [slice(20, 28)],  # beyond the end
        [slice(-4, 0)],
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[slice]) -> None:
    with pytest.raises(ValueError, match=r"rows=\[.*\] do not fit 24 outputs; give ascending slices of equal size that do not overlap"):
        LowRankLinear(nn.Linear(8, 24), 2, rows=rows)


# ---- a model ----


def with_trained_branches(model: nn.Module, seed: int = 0, **layout: Any) -> dict[str, LowRankLinear]:
    injected = lora.inject(model, lora.qkv_names(model), 3, rows=lora.kv_rows(16), **layout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in injected.values():
            module.reset_lora_A(generator)
            module.lora_B.normal_(std=0.3, generator=generator)
    return injected


def test_injection_keeps_the_models_numbers_names_and_parameters() -> None:
    model = tiny_vit()
    x = torch.randn(2, 3, 16, 16)
    before, parameters = model(x), dict(model.named_parameters())
    injected = lora.inject(model, lora.qkv_names(model, [1]), 4, rows=lora.kv_rows(16))
    assert list(injected) == ["blocks.1.attn.qkv"]
    assert injected == lora.branches(model)
    assert torch.equal(model(x), before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert set(after) - set(parameters) == {"blocks.1.attn.qkv.lora_B"}
    assert set(model.state_dict()) - set(parameters) == {"blocks.1.attn.qkv.lora_A", "blocks.1.attn.qkv.lora_B"}


def test_injection_draws_in_order_from_the_generator() -> None:
    names = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    draws = []
    for _ in range(2):
        injected = lora.inject(tiny_vit(), names, 2, train_A=True, generator=torch.Generator().manual_seed(3))
        draws.append([module.lora_A for module in injected.values()])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_trained_numbers_on_vit_b_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    injected = lora.inject(vit, lora.qkv_names(vit), 10, rows=lora.kv_rows(768))
    branch = sum(parameter.numel() for module in injected.values() for parameter in [module.lora_B])
    head = 768 * 10 + 10
    assert branch == 184_320
    assert branch + head == 192_010
    assert branch + 768 * 20 + 20 == 199_700
    assert len(lora.qkv_names(vit, [0, 1, 2, 3, 4])) * 2 * 768 * 10 == 76_800


@pytest.mark.parametrize("layout", [{}, {"share_A": False}, {"train_A": True}])
def test_merging_keeps_the_logits_and_removing_gives_a_plain_vit_back(layout: dict[str, Any]) -> None:
    model, stock = tiny_vit(), tiny_vit()
    parameters = dict(model.named_parameters())
    with_trained_branches(model, **layout)
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        live = model(x)
        assert (live - stock(x)).abs().max() > 0.01 * live.abs().max()  # the branches do something
        lora.merge(model)
        merged = model(x)
        assert all(module.lora_B.count_nonzero() == 0 for module in lora.branches(model).values())
        lora.remove(model)
        plain = model(x)
    for logits in (merged, plain):
        assert (logits - live).abs().max() <= 1e-5 * live.abs().max()
        assert torch.equal(logits.argmax(1), live.argmax(1))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert lora.branches(model) == {}
    assert type(model.get_submodule("blocks.0.attn.qkv")) is nn.Linear
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    stock.load_state_dict(model.state_dict())  # plain timm loads it
    with torch.no_grad():
        assert torch.equal(stock(x), plain)


def test_merging_stores_the_effective_weight_once() -> None:
    model = tiny_vit()
    injected = with_trained_branches(model)
    expected = {name: lora.effective_weight(module) for name, module in injected.items()}
    query = {name: module.weight[:16].clone() for name, module in injected.items()}
    for _ in range(2):  # the second time there is nothing to add
        lora.merge(model)
        for name, module in injected.items():
            assert torch.equal(module.weight, expected[name])
            assert torch.equal(module.weight[:16], query[name])


def test_merging_several_branches_adds_their_products() -> None:
    model = tiny_vit(dtype=torch.float64)
    names = lora.qkv_names(model)
    expected = {name: lora.effective_weight(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]
    for task in range(4):
        for name, module in with_trained_branches(model, seed=task).items():
            expected[name] += dense_delta(module).detach()
        lora.merge(model)
        lora.remove(model)
    for name in names:
        assert torch.allclose(lora.effective_weight(model.get_submodule(name)), expected[name], atol=1e-13)  # type: ignore[arg-type]


def test_merging_rounds_once() -> None:
    torch.manual_seed(0)
    module = LowRankLinear(nn.Linear(64, 64), 32)
    with torch.no_grad():
        module.lora_A.normal_()
        module.lora_B.normal_()
    exact = module.weight.detach().double() + module.lora_B[0].detach().double() @ module.lora_A.double()
    lora.merge(nn.Sequential(module))
    assert torch.equal(module.weight, exact.float())


def test_removing_without_merging_drops_the_branch() -> None:
    model = tiny_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_trained_branches(model)
    lora.remove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_removing_keeps_frozen_weights_frozen_and_the_mode() -> None:
    model = tiny_vit().eval()
    model.requires_grad_(False)
    lora.inject(model, ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"], 2)
    assert lora.branches(model)["blocks.0.mlp.fc1"].lora_B.requires_grad
    lora.remove(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_merged_copy_is_plain_and_leaves_the_model_alone() -> None:
    model = tiny_vit()
    with_trained_branches(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = lora.merged_copy(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (plain(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    assert lora.branches(plain) == {}
    assert len(lora.branches(model)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_names_of_the_projections() -> None:
    model = tiny_vit(depth=3)
    assert lora.qkv_names(model) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.2.attn.qkv"]
    assert lora.qkv_names(model, [2, 0]) == ["blocks.0.attn.qkv", "blocks.2.attn.qkv"], "from the input on"
    for blocks in ([3], [-1], [0, 0], []):
        with pytest.raises(
            ValueError, match=r"method\.blocks=\[.*\] does not fit this backbone; choose distinct numbers from 0\.\.2, or null"
        ):
            lora.qkv_names(model, blocks)
    assert lora.kv_rows(768) == (slice(768, 1536), slice(1536, 2304))


@pytest.mark.parametrize("refuse", [lora.check_rank, lora.inject])
def test_wrong_names_and_ranks_are_refused_and_nothing_changes(refuse: Any) -> None:
    model = tiny_vit()
    known = r"choose among blocks\.\*\.attn\.proj, blocks\.\*\.attn\.qkv, blocks\.\*\.mlp\.fc1, blocks\.\*\.mlp\.fc2, head$"
    for name in ("blocks.2.attn.qkv", "blocks.0.norm1", ""):
        with pytest.raises(ValueError, match=rf"^{name} is no plain linear layer of this model; {known}"):
            refuse(model, ["blocks.0.attn.qkv", name], 2)
    with pytest.raises(ValueError, match=r"^method\.rank=17 exceeds the layer's 16 inputs; choose 1\.\.16$"):
        refuse(model, ["blocks.0.mlp.fc2", "blocks.0.attn.qkv"], 17)  # fits the first, 64 wide, not the second
    with pytest.raises(ValueError, match=r"^method\.rank=0 is below 1; choose 1\.\.16$"):
        refuse(model, ["blocks.0.attn.qkv"], 0)
    assert lora.branches(model) == {}


def test_a_layer_has_one_branch_only() -> None:
    model = tiny_vit()
    lora.inject(model, ["head"], 2)
    with pytest.raises(ValueError, match="head is no plain linear layer"):
        lora.inject(model, ["head"], 2)


# ---- what InfLoRA claims of a branch ----


def protecting(basis: Tensor, kind: str) -> DualGPM:
    """A memory that protects the span of `basis` (dim, k), orthonormal, stored as `kind`."""
    memory = DualGPM(len(basis))
    stored = basis if kind == "remove" else torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    memory.load_state_dict({**memory.state_dict(), "kind": kind, "basis": stored})
    return memory


def old_and_new(seed: int, dim: int, protected: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of old inputs (dim, protected), and the covariance of new ones, which overlap with them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, protected, generator=generator, dtype=torch.float64)).Q
    inputs = torch.randn(100, dim, generator=generator, dtype=torch.float64) + 3 * basis.sum(1)
    return basis, inputs.mT @ inputs / 100


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["remove", "retain"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_a_designed_branch_leaves_protected_inputs_alone(seed: int, kind: str, optimizer: Any) -> None:
    basis, C = old_and_new(seed, 16, 9)
    module = LowRankLinear(nn.Linear(16, 48, dtype=torch.float64), 4, rows=lora.kv_rows(16))
    module.set_lora_A(design_branch(C, protecting(basis, kind), 4))
    old_inputs = torch.randn(50, 9, dtype=torch.float64) @ basis.mT
    new_inputs = torch.randn(50, 16, dtype=torch.float64)
    before_old, before_new = module(old_inputs).detach(), module(new_inputs).detach()

    train_branch(module, [module.lora_B], 16, steps=20, optimizer=optimizer)
    assert (module(new_inputs) - before_new).abs().max() > 1e-2
    assert (module(old_inputs) - before_old).abs().max() < 1e-10
    lora.merge(nn.Sequential(module))
    assert (module(old_inputs) - before_old).abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore::inflora.subspace.MissingDirectionsWarning")
@pytest.mark.parametrize("energy", ["gram", "input"])
def test_a_stream_of_tasks_leaves_every_protected_direction_alone(energy: Any) -> None:
    torch.manual_seed(0)
    dim, memory = 12, DualGPM(12, energy=energy)
    module = LowRankLinear(nn.Linear(dim, dim, dtype=torch.float64), 3)
    for task in range(6):  # ends with nothing free: then the branch is zero and nothing changes at all
        _, C = old_and_new(task, dim, 2)
        module.set_lora_A(design_branch(C, memory, 3))
        free = memory.free_basis()
        protected = torch.eye(dim, dtype=torch.float64) - free @ free.mT
        before, weight = module(protected).detach(), module.weight.detach().clone()
        train_branch(module, [module.lora_B], dim)
        lora.merge(nn.Sequential(module))
        assert (module(protected) - before).abs().max() < 1e-10
        assert torch.equal(module.weight, weight) == (memory.dimension == dim)
        memory.update(C, 0.97 if task < 4 else 1.0)
    assert memory.dimension == dim


def test_rows_of_the_change_lie_in_the_span_of_lora_A() -> None:
    _, C = old_and_new(0, 16, 2)
    module = LowRankLinear(nn.Linear(16, 48), 4, rows=lora.kv_rows(16))
    module.set_lora_A(design_branch(C, DualGPM(16), 4))
    before = lora.effective_weight(module)
    train_branch(module, [module.lora_B], 16)
    lora.merge(nn.Sequential(module))
    change = module.weight.detach() - before
    rows = torch.linalg.qr(module.lora_A.mT).Q
    assert change.abs().max() > 1e-2
    assert (change - change @ rows @ rows.mT).abs().max() < 1e-5


def test_only_lora_B_trains() -> None:
    model = tiny_vit()
    model.requires_grad_(False)
    injected = lora.inject(model, lora.qkv_names(model), 3, rows=lora.kv_rows(16))
    for module in injected.values():
        module.reset_lora_A(torch.Generator().manual_seed(0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"blocks.0.attn.qkv.lora_B", "blocks.1.attn.qkv.lora_B"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(4, 3, 16, 16)).square().mean().backward()
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


@pytest.mark.parametrize("scale", [1.0, 3**-0.5])
def test_sgd_on_the_branch_is_projected_sgd_on_the_weight(scale: float) -> None:
    _, C = old_and_new(0, 8, 2)
    module = LowRankLinear(nn.Linear(8, 24, dtype=torch.float64), 3, rows=KV)
    module.set_lora_A(design_branch(C, protecting(old_and_new(1, 8, 2)[0], "remove"), 3, scale=scale))
    rows = module.lora_A / scale
    full = nn.Linear(8, 24, dtype=torch.float64)
    full.load_state_dict({"weight": module.weight, "bias": module.bias})
    branch_step, lr = torch.optim.SGD([module.lora_B], lr=0.05), 0.05
    for step in range(10):  # the whole trajectory, not the first step only
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        branch_step.zero_grad()
        module(x).sin().sum().backward()
        branch_step.step()
        (gradient,) = torch.autograd.grad(full(x).sin().sum(), [full.weight])
        with torch.no_grad():
            full.weight[8:] -= lr * scale**2 * gradient[8:] @ rows.mT @ rows
        assert torch.allclose(lora.effective_weight(module), full.weight, atol=1e-12)


# ---- parts of a forward pass -------------------------------------------------------------------------------------------------------


def test_a_pass_ends_at_the_layer_whose_input_is_wanted():
    vit = toy.toy_vit().eval()
    x, seen, called = torch.rand(2, 3, toy.IMAGE_SIZE, toy.IMAGE_SIZE), [], []
    wanted = vit.blocks[1].attn.qkv
    for name, module in vit.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    wanted.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    lora.run_until(wanted, vit, x)
    assert "blocks.1.norm1" in called and not {"blocks.1.attn.qkv", "blocks.1.mlp", "norm", ""} & set(called)
    vit(x)
    assert "norm" in called
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_a_fault_in_a_pass_that_ends_early_is_not_swallowed():
    vit = toy.toy_vit()
    with pytest.raises(AssertionError):
        lora.run_until(vit.blocks[1].attn.qkv, vit, torch.rand(2, 3, 2 * toy.IMAGE_SIZE, toy.IMAGE_SIZE))
    assert not vit.blocks[1].attn.qkv._forward_pre_hooks
