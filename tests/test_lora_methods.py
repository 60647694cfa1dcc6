"""The relatives of InfLoRA: each is held to the formula that defines it, computed slowly."""

import copy
from typing import Any

import pytest
import torch
import toy
from learning import Fit, build, layer_inputs, learn, scores, test_images
from torch import Tensor

from inflora import lora
from inflora.interference import InterferenceProbe
from inflora.methods.lora_drs import augmented_triplet_loss
from inflora.methods.splitlora import num_principal
from inflora.parts.low_rank import LowRankMethod

D = toy.EMBED_DIM


def begun(name: str, *overrides: str, task: int = 1, epochs: int = 2) -> LowRankMethod:
    """A method on a toy backbone that has just begun its second task (or another), with a `lora_B` that is no longer zero."""
    method = build([f"method={name}", *overrides])
    assert isinstance(method, LowRankMethod)
    stages = toy.sequence()
    learn(method, [stages[index] for index in range(task)], epochs)
    Fit(method, stages[task]).begin()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for branch in method.branches.values():
            branch.lora_B.copy_(torch.randn(branch.lora_B.shape, generator=draw))
    return method


def weights(method: LowRankMethod) -> dict[str, Tensor]:
    """What the adapted layers multiply their inputs with."""
    return {name: lora.effective_weight(method.backbone.get_submodule(name)) for name in method.targets}  # type: ignore[arg-type]


def refused(message: str, *overrides: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        build(list(overrides))
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)


# ---- what they share ---------------------------------------------------------------------------------------------------------------


def test_the_merged_sum_is_what_the_tasks_have_added_to_the_weights():
    method = build(["method=c_lora"])
    start = weights(method)  # type: ignore[arg-type]
    learn(method, toy.sequence(), epochs=3)
    for row, (name, weight) in enumerate(weights(method).items()):  # type: ignore[arg-type]
        added = (weight - start[name])[D:]
        assert added.abs().max() > 1e-4
        torch.testing.assert_close(method.merged_sum[row], added, rtol=0, atol=1e-6)


# ---- C-LoRA ------------------------------------------------------------------------------------------------------------------------


def test_c_lora_penalty_is_the_sum_over_all_weights_one_by_one():
    method: Any = begun("c_lora")
    expected = 0.0
    for row, branch in enumerate(method.branches.values()):
        for part in range(2):
            delta = (branch.lora_B[part].double() @ branch.lora_A[part].double()).detach()
            for i in range(D):
                for j in range(D):
                    expected += (float(method.merged_sum[row, part * D + i, j]) * float(delta[i, j])) ** 2
    assert expected > 0
    assert method.self_regularization().item() == pytest.approx(expected, rel=1e-5)


def test_c_lora_penalty_has_its_closed_form_gradient():
    """With X = S * S * (B A): 2 X A^T for B and 2 B^T X for A."""
    method: Any = begun("c_lora").double()
    method.self_regularization().backward()
    for row, branch in enumerate(method.branches.values()):
        for part in range(2):
            S, A, B = method.merged_sum[row, part * D : (part + 1) * D], branch.lora_A[part].detach(), branch.lora_B[part].detach()
            X = S * S * (B @ A)
            torch.testing.assert_close(branch.lora_B.grad[part], 2 * X @ A.mT)
            torch.testing.assert_close(branch.lora_A.grad[part], 2 * B.mT @ X)


def test_c_lora_penalty_and_its_gradient_are_zero_in_the_first_task():
    method: Any = begun("c_lora", task=0)
    penalty = method.self_regularization()
    penalty.backward()
    assert penalty.item() == 0
    assert not any(branch.lora_A.grad.any() or branch.lora_B.grad.any() for branch in method.branches.values())


def test_c_lora_weights_that_nobody_changed_cost_nothing():
    method: Any = begun("c_lora")
    untouched = torch.rand(method.merged_sum.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    method.merged_sum[untouched] = 0
    updates = method.updates().detach()
    before = method.self_regularization()
    method.updates = lambda: torch.where(untouched, 100.0, updates)
    assert method.self_regularization() == before


def test_c_lora_weights_its_penalty_and_keeps_away_from_what_was_changed():
    first, second, _ = toy.sequence()
    moved = []
    for penalty in (0, 1e6):
        method: Any = build(["method=c_lora", f"method.penalty={penalty}"])
        learn(method, [first], epochs=4)
        fit = Fit(method, second).begin()
        x, y = next(iter(second.batches("test", stream="any")))
        with torch.no_grad():
            for branch in method.branches.values():
                branch.lora_B.fill_(1e-3)
            extra = method.loss(x, y) - method.local_cross_entropy(method.features(x), y)
            torch.testing.assert_close(extra, penalty * method.self_regularization(), rtol=1e-4, atol=1e-6)
            for branch in method.branches.values():
                branch.lora_B.zero_()
        fit.train(epochs=4)
        moved.append(method.self_regularization().item() / method.updates().square().sum().item())
    assert moved[1] < 0.2 * moved[0], "per unit of change, less of it falls on the weights of the first task"


def test_c_lora_predicts_the_same_before_and_after_merging():
    method = build(["method=c_lora"])
    tasks = toy.sequence()
    for task in tasks:
        fit = Fit(method, task).begin().train(epochs=3)
        before = scores(method, test_images(tasks))
        fit.end()
        torch.testing.assert_close(scores(method, test_images(tasks)), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_c_lora_refuses_a_negative_penalty():
    refused("method.penalty=-1 is no weight of a penalty; choose 0 or more", "method=c_lora", "method.penalty=-1")


# ---- O-LoRA ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["l1", "l2"])
@pytest.mark.parametrize("normalise", [True, False])
def test_o_lora_overlap_is_the_sum_over_all_pairs_of_rows(overlap, normalise):
    method: Any = build(["method=o_lora", f"method.overlap={overlap}", f"method.normalise={normalise}"])
    first, second, third = toy.sequence()
    kept = []  # the older tasks' rows, layer by layer and slice by slice
    for task in (first, second):
        Fit(method, task).begin().train()
        kept.append(method.new_A().detach())
        Fit(method, task).end()
    Fit(method, third).begin()
    expected = 0.0
    for old in kept:
        for old_rows, new_rows in zip(old.flatten(0, 1).double(), method.new_A().detach().flatten(0, 1).double(), strict=True):
            for a in old_rows:
                for b in new_rows:
                    product = float(a @ b) / (float(a.norm() * b.norm()) if normalise else 1.0)
                    expected += abs(product) if overlap == "l1" else product**2
    assert expected > 1e-3
    assert method.overlaps().item() == pytest.approx(expected, rel=1e-4)


def test_o_lora_overlap_has_its_closed_form_gradient_and_leaves_lora_B_free():
    """For lora_A: the sum over older tasks of sign(A A_j^T) A_j; nothing for lora_B."""
    method: Any = begun("o_lora", task=2).double()
    method.overlaps().backward()
    for row, branch in enumerate(method.branches.values()):
        for part in range(2):
            A, old = branch.lora_A[part].detach(), method.old_A[row, part]
            by_task = [torch.sign(A @ A_j.mT) @ A_j for A_j in old.split(2)]
            assert len(by_task) == 2
            torch.testing.assert_close(branch.lora_A.grad[part], torch.stack(by_task).sum(0))
        assert branch.lora_B.grad is None


def test_o_lora_overlap_is_zero_in_the_first_task():
    method: Any = begun("o_lora", task=0)
    assert method.overlaps().item() == 0


@pytest.mark.parametrize("overlap", ["l1", "l2"])
def test_o_lora_becomes_orthogonal_under_a_large_weight_while_lora_B_learns(overlap):
    first, second, _ = toy.sequence()
    found = {}
    for penalty in (0, 1e4):
        method: Any = build(["method=o_lora", f"method.penalty={penalty}", f"method.overlap={overlap}"])
        learn(method, [first], epochs=3)
        fit = Fit(method, second).begin()
        for lr in (1e-2, 1e-3, 1e-4):  # a step of Adam is as long as its rate: the sum of absolute values rests only as the rate falls
            fit.train(epochs=15, lr=lr)
        found[penalty] = method.overlaps().item(), float(method.updates().detach().norm())
    assert found[1e4][0] < 0.02 * found[0][0]
    assert found[1e4][1] > 0.1, "the branch has learned nevertheless"


def test_o_lora_keeps_the_old_factors_bit_for_bit():
    method: Any = build(["method=o_lora"])
    kept = []
    for task in toy.sequence():
        Fit(method, task).begin().train()
        kept.append(method.new_A().detach().clone())
        Fit(method, task).end()
        assert torch.equal(method.old_A, torch.cat(kept, dim=2))


def test_o_lora_shorter_rows_lower_the_overlap_unless_it_is_normalised():
    for normalise, factor in ((False, 0.1), (True, 1.0)):
        method: Any = begun("o_lora", f"method.normalise={normalise}")
        before = method.overlaps().item()
        with torch.no_grad():
            for branch in method.branches.values():
                branch.lora_A *= 0.1
        assert method.overlaps().item() == pytest.approx(factor * before, rel=1e-4)


def test_o_lora_adds_the_weighted_overlap():
    method: Any = begun("o_lora", "method.penalty=0.3")
    x, y = next(iter(toy.sequence()[1].batches("test", stream="any")))
    expected = method.local_cross_entropy(method.features(x), y) + 0.3 * method.overlaps()
    torch.testing.assert_close(method.loss(x, y), expected)


def test_o_lora_adds_the_norms_of_the_new_factors():
    method: Any = begun("o_lora", "method.penalty=0", "method.norm_penalty=0.3")
    x, y = next(iter(toy.sequence()[1].batches("test", stream="any")))
    factors = [factor[part] for branch in method.branches.values() for factor in (branch.lora_A, branch.lora_B) for part in range(2)]
    expected = method.local_cross_entropy(method.features(x), y) + 0.3 * sum(factor.square().sum().sqrt() for factor in factors)
    torch.testing.assert_close(method.loss(x, y), expected)


def test_o_lora_reports_what_overlap_is_left():
    method: Any = build(["method=o_lora"])
    found = []
    for task in toy.sequence():
        learn(method, [task])
        found.append(method.diagnostics()["overlap"])
    assert found[0] is None
    new, old = method.old_A[:, :, -2:], method.old_A[:, :, :-2]
    cosines = torch.nn.functional.cosine_similarity(old.unsqueeze(3), new.unsqueeze(2), dim=-1)
    assert found[-1] == pytest.approx(cosines.abs().mean().item(), rel=1e-4)


def test_o_lora_predicts_the_same_before_and_after_merging():
    method = build(["method=o_lora"])
    tasks = toy.sequence()
    for task in tasks:
        fit = Fit(method, task).begin().train(epochs=3)
        before = scores(method, test_images(tasks))
        fit.end()
        torch.testing.assert_close(scores(method, test_images(tasks)), before, rtol=0, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize(
    "override, message",
    [
        ("penalty=-0.5", "method.penalty=-0.5 is no weight of a penalty; choose 0 or more"),
        ("norm_penalty=-1", "method.norm_penalty=-1 is no weight of a penalty; choose 0 or more"),
        ("overlap=l3", "method.overlap=l3 is not known; choose l1 or l2"),
    ],
)
def test_o_lora_refuses_what_it_does_not_know(override, message):
    refused(message, "method=o_lora", f"method.{override}")


# ---- SD-LoRA -----------------------------------------------------------------------------------------------------------------------


def slowly(method: Any, start: dict[str, Tensor], finished: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """W + sum a_j B_j A_j / (|B_j| |A_j|) + a_t B_t A_t, from the factors each task ended with, in float64."""
    found = {}
    for name, weight in start.items():
        total = weight.double()
        branch = method.branches[name]
        for part, rows in enumerate((slice(0, D), slice(2 * D, 3 * D))):
            for magnitude, factors in zip(method.magnitudes.tolist(), finished, strict=False):
                A, B = (factor[part].double() for factor in factors[name])
                total[rows] += magnitude * B @ A / (A.square().sum().sqrt() * B.square().sum().sqrt())
            total[rows] += method.magnitudes.tolist()[-1] * (branch.lora_B[part].double() @ branch.lora_A[part].double()).detach()
        found[name] = total
    return found


@pytest.mark.parametrize("overrides", [[], ["method.rank_reduction={1: 1}"]])
def test_sd_lora_weights_are_normalised_directions_times_shared_magnitudes(overrides):
    method: Any = build(["method=sd_lora", *overrides])
    start, finished = weights(method), []
    for task in toy.sequence():
        fit = Fit(method, task).begin()
        for moment in ("begun", "trained"):
            if moment == "trained":
                fit.train(epochs=3, lr=3e-2)
            for name, expected in slowly(method, start, finished).items():
                torch.testing.assert_close(weights(method)[name], expected.float(), rtol=0, atol=1e-6)
                assert torch.equal(weights(method)[name][D : 2 * D], start[name][D : 2 * D]), "keys stay bit for bit"
        assert (method.magnitudes - 0.8).abs().min() > 1e-3, "all magnitudes have trained"
        fit.end()
        finished.append({name: (b.lora_A.detach().clone(), b.lora_B.detach().clone()) for name, b in method.branches.items()})


def test_sd_lora_directions_have_norm_one_and_never_change():
    method: Any = build(["method=sd_lora"])
    kept: list[Tensor] = []
    for task in toy.sequence(4, num_classes=8):
        Fit(method, task).begin().train(epochs=2).end()
        branch = next(iter(method.branches.values()))
        assert branch.old_A.shape[-2] == branch.old_B.shape[-1] == 2 * task.index
        for j in range(task.index):
            own = slice(2 * j, 2 * j + 2)
            torch.testing.assert_close(branch.old_A[:, own].norm(dim=(1, 2)), torch.ones(2))
            torch.testing.assert_close(branch.old_B[..., own].norm(dim=(1, 2)), torch.ones(2))
        for old, now in zip(kept, (branch.old_A, branch.old_B), strict=False):
            assert torch.equal(old, now.narrow(1 if now is branch.old_A else 2, 0, max(0, 2 * task.index - 2)))
        kept = [branch.old_A.clone(), branch.old_B.clone()]


def test_sd_lora_magnitudes_are_one_per_task_shared_by_all_layers_and_made_anew():
    method: Any = build(["method=sd_lora"])
    for task in toy.sequence():
        fit = Fit(method, task).begin()
        assert torch.equal(method.magnitudes.detach(), torch.full((task.index + 1,), 0.8))
        x, y = next(iter(task.batches("train", stream="fit")))
        with torch.no_grad():
            for branch in method.branches.values():
                branch.lora_B.normal_()
        (shared,) = torch.autograd.grad(method.loss(x, y), [method.magnitudes])
        apart = []
        for branch in method.branches.values():  # the gradient each layer adds: the others hold a copy that is not asked for
            for other in method.branches.values():
                other._magnitudes = [method.magnitudes if other is branch else method.magnitudes.detach()]
            apart.append(torch.autograd.grad(method.loss(x, y), [method.magnitudes])[0])
        for branch in method.branches.values():
            branch._magnitudes = [method.magnitudes]
            branch.clear()
        torch.testing.assert_close(shared, sum(apart))
        assert all(part.abs().max() > 0 for part in apart)
        fit.train(epochs=2).end()


def test_sd_lora_merged_equals_unmerged():
    method: Any = build(["method=sd_lora"])
    tasks = toy.sequence()
    x = test_images(tasks)
    for task in tasks:
        learn(method, [task], epochs=3)
        merged = lora.merged_copy(method.backbone)
        assert not lora.branches(merged)
        with torch.no_grad():
            expected = method.features(x)
            torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sd_lora_switched_off_is_the_pretrained_model():
    method: Any = build(["method=sd_lora"])
    tasks = toy.sequence()
    x = test_images(tasks)
    learn(method, tasks, epochs=2)
    with torch.no_grad(), lora.disabled(method.backbone):
        assert torch.equal(method.features(x), toy.toy_vit()(x))


def test_sd_lora_interference_is_that_of_the_weights_it_multiplies_with():
    """Its directions are no part of `weight`: the probe has to see them, and the jump at the start of a task."""
    method: Any = build(["method=sd_lora"])
    tasks = list(toy.sequence())
    learn(method, tasks[:1], epochs=3)
    probe = InterferenceProbe()
    probe.before(method.backbone)
    before = weights(method)
    Fit(method, tasks[1]).begin()
    found = probe.after(method.backbone, tasks[:1])
    assert found is not None
    name = method.targets[0]
    inputs = layer_inputs(method.backbone, [name], tasks[0].test_batches())[name]  # of the first layer, which no weight changes
    change = (weights(method)[name] - before[name])[D:].double()
    ratio = (inputs @ change.T).norm() / (inputs @ before[name][D:].double().T).norm()
    assert ratio > 1e-3
    assert found[0][0] == pytest.approx(ratio.item(), rel=1e-4)


def test_sd_lora_rank_falls_with_the_tasks():
    method: Any = build(["method=sd_lora", "method.rank_reduction={4: 8, 8: 6}"])
    method.rank = 10
    assert [method.rank_of(t) for t in range(10)] == [10] * 4 + [8] * 4 + [6] * 2
    assert build(["method=sd_lora"]).rank_of(7) == 2  # type: ignore[operator]


def test_sd_lora_draws_heads_as_its_code_does():
    method: Any = build(["method=sd_lora"])
    Fit(method, toy.sequence(1, num_classes=40)[0]).begin()
    bound = (3 / D) ** 0.5
    assert 0.95 * bound < method.heads.current.weight.abs().max() <= bound
    assert not method.heads.current.bias.any()


def test_sd_lora_a_branch_that_never_moved_has_no_direction():
    method: Any = build(["method=sd_lora"])
    first, second = toy.sequence(2, num_classes=2)
    learn(method, [first])  # one class: nothing trains
    Fit(method, second).begin()
    for branch in method.branches.values():
        assert branch.old_A.isfinite().all() and not branch.old_B.any()


def test_sd_lora_compiles_without_graph_breaks():
    method: Any = begun("sd_lora")
    torch.compiler.reset()
    module = next(iter(method.branches.values()))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, D)
    torch.testing.assert_close(compiled(x), module(x))
    wanted = [module.lora_A, module.lora_B, method.magnitudes]
    expected = torch.autograd.grad(module(x).sin().sum(), wanted)
    for ours, theirs in zip(torch.autograd.grad(compiled(x).sin().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "override, message",
    [
        ("magnitude=0", "method.magnitude=0 starts without the branches; choose a number above 0, such as 0.8"),
        ("rank_reduction={0: 4}", r"method.rank_reduction=\{0: 4\} is no map from tasks \(1 or more\) to ranks in 1..32"),
        ("rank_reduction={3: 33}", r"method.rank_reduction=\{3: 33\} is no map from tasks \(1 or more\) to ranks in 1..32"),
    ],
)
def test_sd_lora_refuses_what_does_not_fit(override, message):
    refused(message, "method=sd_lora", f"method.{override}")


# ---- SplitLoRA ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 3, 20])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 5.0, 20.0, 1e4])
def test_splitlora_split_minimises_the_sum_of_both_losses(num_tasks, alpha):
    """Against the search over all sizes, as the official code writes it."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        energies = torch.rand(D, generator=draw, dtype=torch.float64).pow(1 + seed).sort(descending=True).values
        shares = energies / energies.sum()
        costs = [num_tasks * (1 - float(shares[: i + 1].sum())) - alpha * (D - i) / D for i in range(D)]
        last_protected = min(range(D), key=costs.__getitem__)
        expected = min(max(last_protected, 1) + 1, D - 1)
        assert num_principal(energies, num_tasks, alpha) == expected


def test_splitlora_averages_the_moments_of_all_tasks_images():
    method: Any = build(["method=splitlora"])
    total, tokens = {name: torch.zeros(D, D, dtype=torch.float64) for name in method.targets}, 0
    for task in toy.sequence(task_sizes=[1, 3, 2]):
        fit = Fit(method, task).begin().train()
        method.eval()
        inputs = layer_inputs(method.backbone, method.targets, task.batches("train", stream="moments_after"))
        for name, own in inputs.items():
            total[name] += own.T @ own
        tokens += len(inputs[method.targets[0]])
        fit.end()
        for row, name in enumerate(method.targets):
            torch.testing.assert_close(method.moments[row], (total[name] / tokens).float(), rtol=1e-4, atol=1e-5)


def test_splitlora_designs_frozen_random_rows_in_the_minor_subspace():
    method: Any = build(["method=splitlora", "method.alpha=2"])
    for task in toy.sequence():
        moments = method.moments.double()
        fit = Fit(method, task).begin()
        for C, branch in zip(moments, method.branches.values(), strict=True):
            lora_A = branch.lora_A.double()
            assert lora_A.shape == (2, 2, D)
            assert not torch.allclose(lora_A[0], lora_A[1]), "keys and values draw their own"
            norms = lora_A.norm(dim=(1, 2)) * (task.index + 1)
            assert ((norms > 0.5) & (norms < 1.2)).all(), "two usual rows together have about sqrt(2/3)"
            if task.index:
                U, S, _ = torch.linalg.svd(C)
                count = num_principal(S, task.index, 2.0)
                assert 2 < count < D - 2
                assert (lora_A @ U[:, :count]).abs().max() < 1e-6
            else:
                assert lora_A.abs().max() <= D**-0.5
        frozen = [branch.lora_A.clone() for branch in method.branches.values()]
        fit.train()
        assert all(torch.equal(old, branch.lora_A) for old, branch in zip(frozen, method.branches.values(), strict=True))
        fit.end()


def test_splitlora_rows_are_as_long_as_a_usual_start_divided_by_the_tasks():
    method: Any = build(["method=splitlora"])
    method.num_tasks = 3
    basis = torch.linalg.qr(torch.randn(D, 5, dtype=torch.float64)).Q
    start = torch.randn(2, 4, D)
    mixed = method.mixtures(basis, start)
    assert mixed.shape == start.shape
    for part in range(2):
        assert mixed[part].norm().item() == pytest.approx(start[part].norm().item() / 4, rel=1e-6)
    torch.testing.assert_close(mixed @ basis @ basis.mT, mixed)
    assert torch.linalg.matrix_rank(mixed[0]) == 4


def test_splitlora_leaves_what_it_protects_unchanged():
    method: Any = build(["method=splitlora", "method.alpha=2"])
    first, second, _ = toy.sequence()
    learn(method, [first])
    layers = [method.backbone.get_submodule(name) for name in method.targets]
    inputs, before = [], []
    for C, layer in zip(method.moments.double(), layers, strict=True):
        U, S, _ = torch.linalg.svd(C)
        count = num_principal(S, 1, 2.0)
        inputs.append((torch.randn(20, count, dtype=torch.float64) @ U[:, :count].T).float())
        before.append((layer(inputs[-1]), layer.weight.clone()))
    learn(method, [second], epochs=5)
    for x, (output, weight), name in zip(inputs, before, method.targets, strict=True):
        layer = method.backbone.get_submodule(name)
        assert (layer.weight - weight).norm() > 1e-3
        torch.testing.assert_close(layer(x), output, rtol=0, atol=2e-5)


def test_splitlora_divides_scores_by_its_temperature():
    method: Any = begun("splitlora", "method.temperature=7")
    x, y = next(iter(toy.sequence()[1].batches("test", stream="any")))
    expected = torch.nn.functional.cross_entropy(method.heads.current(method.features(x)) / 7, y - 2)
    torch.testing.assert_close(method.loss(x, y), expected)
    everything = torch.nn.functional.cross_entropy(method.heads(method.features(x)) / 7, y)
    torch.testing.assert_close(method.global_cross_entropy(method.features(x), y, temperature=7), everything)


def test_splitlora_reports_the_room_for_the_next_task():
    method: Any = build(["method=splitlora", "method.alpha=2"])
    stages = list(toy.sequence())
    learn(method, stages[:2])
    found = method.diagnostics()["minor_dimensions"]
    assert found == [method.minor_basis(moments).shape[1] for moments in method.moments]
    assert all(1 <= size < D for size in found)


@pytest.mark.parametrize("key", ["alpha", "temperature"])
def test_splitlora_refuses_zero(key):
    refused(f"method.{key}=0 is too small; choose a number above 0", "method=splitlora", f"method.{key}=0")


# ---- LoRA-DRS ----------------------------------------------------------------------------------------------------------------------


def slow_triplet_loss(features: Tensor, y: Tensor, prototypes: Tensor, margin: float) -> Tensor:
    """Image by image."""
    anchors = [row / row.norm() for row in features]
    means = [row / row.norm() for row in prototypes]
    losses = []
    for i, anchor in enumerate(anchors):
        positives = [(anchor - other).square().sum().clamp(min=1e-12).sqrt() for j, other in enumerate(anchors) if y[j] == y[i]]
        negatives = [(anchor - other).norm() for j, other in enumerate(anchors) if y[j] != y[i]] + [
            (anchor - mean).norm() for mean in means
        ]
        losses.append(torch.relu(margin + max(positives) - min(negatives)) if negatives else torch.zeros((), dtype=features.dtype))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("num_prototypes", [0, 3])
@pytest.mark.parametrize("labels", [[5, 6, 5, 7, 6, 5], [5, 5, 5, 5, 5, 5], [5, 6, 7, 8, 9, 10]])
def test_lora_drs_triplet_loss_is_that_of_the_hardest_images_and_means(num_prototypes, labels):
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(6, 4, generator=draw).requires_grad_()
    prototypes, y = 3 * torch.randn(num_prototypes, 4, generator=draw), torch.tensor(labels)
    ours = augmented_triplet_loss(features, y, prototypes, 0.7)
    slow = slow_triplet_loss(features, y, prototypes, 0.7)
    torch.testing.assert_close(ours, slow)
    if slow.requires_grad and slow > 0:
        torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (ours, slow)))
    elif ours.requires_grad:
        assert not torch.autograd.grad(ours, features)[0].any()


def test_lora_drs_adds_the_weighted_triplet_loss():
    method: Any = begun("lora_drs", "method.triplet=0.3", "method.margin=2")
    x, y = next(iter(toy.sequence()[1].batches("test", stream="any")))
    features = method.features(x)
    extra = slow_triplet_loss(features, y, method.prototypes.means, 2.0)
    assert len(method.prototypes.means) == 2 and extra > 0.1
    torch.testing.assert_close(method.loss(x, y), method.local_cross_entropy(features, y) + 0.3 * extra)


def test_lora_drs_subtracts_what_was_added_from_the_pretrained_weights():
    method: Any = build(["method=lora_drs"])
    pretrained = weights(method)
    stages = list(toy.sequence())
    learn(method, stages[:2], epochs=3)
    now = weights(method)
    with method.subtracted():
        for name, weight in weights(method).items():
            assert (now[name] - pretrained[name]).abs().max() > 1e-4
            torch.testing.assert_close(weight, pretrained[name] - (now[name] - pretrained[name]), rtol=0, atol=1e-6)
    assert all(torch.equal(weight, now[name]) for name, weight in weights(method).items())
    with pytest.raises(KeyError), method.subtracted():
        raise KeyError
    assert all(torch.equal(weight, now[name]) for name, weight in weights(method).items())


def test_lora_drs_projects_on_the_leading_inputs_of_the_subtracted_model():
    method: Any = build(["method=lora_drs", "method.threshold=0.9"])
    first, second, third = toy.sequence()
    pretrained = weights(method)
    learn(method, [first, second], epochs=3)
    assert method.projectors.untyped_storage().nbytes() == 0, "nothing of them is kept between tasks"
    model = copy.deepcopy(method.backbone)
    for name in method.targets:
        layer = model.get_submodule(name)
        layer.weight.data = 2 * pretrained[name] - layer.weight.data
    inputs = layer_inputs(model, method.targets, third.batches("train", stream="moments_before"))
    Fit(method, third).begin()
    for row, name in enumerate(method.targets):
        U, S, _ = torch.linalg.svd(inputs[name].T @ inputs[name])
        size = next(k for k in range(1, D + 1) if S[:k].sum() / S.sum() >= 0.9)
        assert 1 < size < D
        expected = U[:, :size] @ U[:, :size].T
        torch.testing.assert_close(method.projectors[row], (expected / expected.norm()).float(), rtol=0, atol=1e-5)
        assert method.diagnostics()["drift_resistant_dimensions"][row] == size


@pytest.mark.parametrize("optimizer, lr", [(torch.optim.Adam, 1e-2), (torch.optim.SGD, 10.0)])
def test_lora_drs_projects_the_step_of_the_optimiser(optimizer, lr):
    """One step, with the projectors and without them."""
    method: Any = build(["method=lora_drs", "method.threshold=0.9"])
    stages = list(toy.sequence(batch_size=100))
    learn(method, stages[:1])
    Fit(method, stages[1]).begin()
    free = copy.deepcopy(method)
    free.projectors = free.projectors[:0]
    start = [(b.lora_A.detach().clone(), b.lora_B.detach().clone()) for b in method.branches.values()]
    for one in (method, free):
        Fit(one, stages[1]).train(optimizer=optimizer, lr=lr)
    for P, (A, B), ours, theirs in zip(method.projectors, start, method.branches.values(), free.branches.values(), strict=True):
        full_A, full_B = theirs.lora_A.detach() - A, theirs.lora_B.detach() - B
        assert (full_A - full_A @ P).norm() > 0.1 * full_A.norm()
        for step, expected in ((ours.lora_A.detach() - A, full_A @ P), (ours.lora_B.detach() - B, P @ full_B)):
            assert (step - expected).norm() < 1e-4 * expected.norm()


def test_lora_drs_stays_in_the_space_over_many_steps_but_not_in_the_first_task():
    method: Any = build(["method=lora_drs", "method.threshold=0.9"])
    for task in toy.sequence():
        fit = Fit(method, task).begin()
        start = [(b.lora_A.detach().clone(), b.lora_B.detach().clone()) for b in method.branches.values()]
        projectors = [P * (size**0.5) for P, size in zip(method.projectors, method.dimensions, strict=True)] or [torch.eye(D)] * 2
        fit.train(epochs=4)
        for P, (A, B), branch in zip(projectors, start, method.branches.values(), strict=True):
            for change, kept in (((branch.lora_A - A).detach(), 1), ((branch.lora_B - B).detach(), 0)):
                inside = change @ P if kept else P @ change
                assert change.norm() > 1e-3
                assert (change - inside).norm() < 1e-3 * change.norm()
        fit.end()


def test_lora_drs_starts_lora_B_with_one_small_entry_in_every_column():
    method: Any = build(["method=lora_drs"])
    method.rank = 16
    Fit(method, toy.sequence()[0]).begin()
    drawn = torch.cat([branch.lora_B.detach() for branch in method.branches.values()])
    assert drawn.shape == (4, D, 16)
    assert ((drawn != 0).sum(1) == 1).all()
    values = drawn[drawn != 0]
    assert 0.007 < values.std() < 0.013
    assert len((drawn != 0).nonzero()[:, 1].unique()) > 20, "in rows drawn at random"


def test_lora_drs_scores_are_cosines_with_the_means_of_when_a_class_was_learned():
    method: Any = build(["method=lora_drs"])
    tasks = toy.sequence()
    kept = torch.zeros(0, D)
    for task in tasks:
        learn(method, [task])
        with torch.no_grad():
            pairs = [(method.features(x), y) for x, y in task.batches("test", stream="any")]
        features, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        new = torch.stack([features[y == c].mean(0) for c in range(2 * task.index, 2 * task.index + 2)])
        torch.testing.assert_close(method.prototypes.means[-2:], new)
        assert torch.equal(method.prototypes.means[:-2], kept)
        kept = method.prototypes.means.clone()
    x = test_images(tasks)
    with torch.no_grad():
        features = method.features(x)
    expected = torch.nn.functional.cosine_similarity(features.unsqueeze(1), kept, dim=-1)
    torch.testing.assert_close(scores(method, x), expected)
    distances = (features / features.norm(dim=1, keepdim=True)).unsqueeze(1) - kept / kept.norm(dim=1, keepdim=True)
    assert torch.equal(scores(method, x).argmax(1), distances.square().sum(-1).argmin(1)), "the nearest mean, as in the official code"


@pytest.mark.parametrize(
    "override, message",
    [
        ("threshold=0", "method.threshold=0 is no share of energy; choose a number above 0, at most 1"),
        ("threshold=1.1", "method.threshold=1.1 is no share of energy; choose a number above 0, at most 1"),
        ("triplet=-1", "method.triplet=-1 is negative; choose 0 or more"),
        ("margin=-1", "method.margin=-1 is negative; choose 0 or more"),
    ],
)
def test_lora_drs_refuses_what_does_not_fit(override, message):
    refused(message, "method=lora_drs", f"method.{override}")
