"""The relatives of InfLoRA: each is held to the formula that defines it, computed slowly."""

from typing import Any

import pytest
import torch
import toy
from learning import Fit, build, learn, scores, test_images
from torch import Tensor

from inflora import lora
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
