"""Classifier alignment and the methods that live on class Gaussians: InfLoRA+CA, SLCA, FeCAM; and InfLoRA-b5."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from helpers import compose_config, fingerprint, read_events, run_toy
from learning import Fit, build, changed, learn, scores, tensors, test_images
from torch import Tensor, nn

from inflora import lora
from inflora.classifier import TaskHeads
from inflora.methods.fecam import FeCAM, correlations, shrunk
from inflora.methods.inflora import InfLoRA
from inflora.parts.class_statistics import RIDGE
from inflora.parts.classifier_alignment import ClassifierAlignment, gaussian, mean_scales, normalized
from inflora.trainer import trainable_groups

DIM = 8

SETTINGS: dict[str, Any] = {
    "epochs": 5,
    "samples_per_class": 256,
    "lr": 1e-2,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "temperature": 0.1,
    "mean_scale": 0.9,
    "covariance": "full",
    "restore": False,
}


def alignment(**changes: Any) -> ClassifierAlignment:
    return ClassifierAlignment(DIM, **SETTINGS | changes)


def task_heads(sizes: list[int], dim: int = DIM) -> TaskHeads:
    heads = TaskHeads(dim)
    torch.manual_seed(0)
    for size in sizes:
        heads.grow(size, torch.device("cpu"))
    return heads


def cloud(num_classes: int, count: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Classes that share one covariance, spread^2 times a fixed one, around fixed means."""
    fixed = torch.Generator().manual_seed(0)
    means, mix = torch.randn(num_classes, DIM, generator=fixed), torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM, generator=fixed)
    noise = torch.randn(num_classes * count, DIM, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(num_classes).repeat_interleave(count)
    return means[labels] + spread * noise @ mix.T, labels


def fitted(sizes: list[int], spread: float = 0.5, **changes: Any) -> ClassifierAlignment:
    found = alignment(**changes)
    x, y = cloud(sum(sizes), 500, spread, seed=1)
    for size in sizes:
        own = (y >= len(found.statistics)) & (y < len(found.statistics) + size)
        found.statistics.add_features([(x[own], y[own])], size)
    return found


# ---- the formulas ------------------------------------------------------------------------------------------------------------------


def test_means_of_older_tasks_are_shrunk_by_the_real_class_to_task_map():
    assert mean_scales([1, 3, 2], 0.9) == pytest.approx([0.9 + 0.1 / 3] + 3 * [0.9 + 0.2 / 3] + 2 * [1.0])
    assert mean_scales([2], 0.9) == [1.0, 1.0]
    assert mean_scales([1] * 10, 1.0) == [1.0] * 10
    found = fitted([2, 1, 3])
    x, y = found.samples([2, 1, 3])
    assert y.bincount().tolist() == [256] * 6
    for label, scale in enumerate(mean_scales([2, 1, 3], 0.9)):
        error = x[y == label].mean(0) - scale * found.statistics.means[label]
        assert (error / found.statistics.covariance(label).diagonal().sqrt()).abs().max() < 0.3  # five deviations of the mean of 256


def test_scores_are_divided_by_the_mean_norm_of_the_tasks_scores():
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found = normalized(z, [2, 1, 3])
    for row, out in zip(z, found, strict=True):
        norms = [row[:2].norm(), row[2:3].norm(), row[3:].norm()]
        torch.testing.assert_close(out, row / (sum(norms) / 3 + 1e-7))
    assert torch.autograd.gradcheck(lambda z: normalized(z, [2, 1, 3]), z)
    # Through the norm: scaling all scores changes nothing, so the gradient has no part along them.
    (gradient,) = torch.autograd.grad(F.cross_entropy(found / 0.1, torch.tensor([0, 2, 3, 5])), z)
    assert (gradient * z).sum(1).abs().max() < 1e-6 < gradient.abs().max()


def test_alignment_is_the_published_algorithm():
    """Against a plain form of it: one pass of modules, torch's multivariate normal and cosine schedule."""
    sizes = [2, 1, 3]
    found = fitted(sizes, samples_per_class=32)
    heads = task_heads(sizes)
    reference = copy.deepcopy(heads.heads)
    torch.manual_seed(3)
    found.align(heads)

    torch.manual_seed(3)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for _ in range(5):
        drawn = []
        for label, task in enumerate([0, 0, 1, 2, 2, 2]):
            mean = found.statistics.means[label] * (0.9 + (task + 1) / 3 * 0.1)
            covariance = found.statistics.covariances[label] + RIDGE * torch.eye(DIM)
            drawn.append(torch.distributions.MultivariateNormal(mean, covariance).sample((32,)))
        x, y = torch.cat(drawn), torch.arange(6).repeat_interleave(32)
        order = torch.randperm(len(y))
        x, y = x[order], y[order]
        for step in range(6):
            rows = slice(32 * step, 32 * (step + 1))
            parts = [head(x[rows]) for head in reference]
            norm = torch.stack([part.norm(dim=1) + 1e-7 for part in parts]).mean(0)
            optimizer.zero_grad()
            F.cross_entropy(torch.cat(parts, 1) / norm[:, None] / 0.1, y[rows]).backward()
            optimizer.step()
        schedule.step()
    for ours, theirs in zip(heads.heads, reference, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spread, changes", [(0.3, {}), (0.8, {"temperature": None, "mean_scale": 1.0, "weight_decay": 0.0, "lr": 0.3, "epochs": 20})]
)
def test_aligned_heads_reach_the_bayes_classifier(spread, changes):
    """Classes far apart with the published settings; overlapping ones with what it takes to get to the optimum."""
    sizes = [3, 1, 2]
    found = fitted(sizes, spread, **changes)
    heads = task_heads(sizes)
    x, y = cloud(6, 2000, spread, seed=2)
    with torch.no_grad():
        before = (heads(x).argmax(1) == y).float().mean().item()
        found.align(heads)
        after = (heads(x).argmax(1) == y).float().mean().item()
    densities = [
        torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
        for mean, covariance in zip(found.statistics.means, found.statistics.covariances, strict=True)
    ]
    bayes = (torch.stack(densities, 1).argmax(1) == y).float().mean().item()
    assert before < 0.5
    assert bayes > 0.99 if spread == 0.3 else 0.8 < bayes < 0.97
    assert after > bayes - 0.01


def test_a_class_without_images_is_not_drawn():
    found = alignment(samples_per_class=4)
    found.statistics.add_features([(torch.randn(5, DIM), torch.tensor([0, 0, 2, 2, 2]))], 3)
    assert found.samples([3])[1].tolist() == [0] * 4 + [2] * 4


# ---- around a method ---------------------------------------------------------------------------------------------------------------

ALIGNED = ["method=sequential", "alignment=gaussian"]


def test_the_first_task_leaves_the_heads_alone_and_later_ones_move_all_of_them():
    method, plain = build(ALIGNED), build(["method=sequential"])
    first, second, third = toy.sequence()
    learn(method, [first])
    learn(plain, [first])
    found = {name: value for name, value in tensors(method).items() if not name.startswith("alignment.")}
    assert not changed(tensors(plain), found)
    learn(method, [second])
    learn(plain, [second])
    found = {name: value for name, value in tensors(method).items() if not name.startswith("alignment.")}
    assert changed(tensors(plain), found) == {f"heads.heads.{task}.{part}" for task in (0, 1) for part in ("weight", "bias")}
    aligned = copy.deepcopy(method.heads.state_dict())
    Fit(method, third).begin()
    assert all(torch.equal(method.heads.state_dict()[name], value) for name, value in aligned.items()), "the next task starts from them"


def test_alignment_reaches_no_weight_of_the_backbone():
    method = build([*ALIGNED, "alignment.restore=true"])
    for task in toy.sequence():
        fit = Fit(method, task).begin().train()
        method.zero_grad(set_to_none=True)
        method.requires_grad_(True)
        before = lora.merged_copy(method.backbone).state_dict()
        fit.end()
        assert all(parameter.grad is None for parameter in method.parameters())
        assert all(torch.equal(value, before[name]) for name, value in lora.merged_copy(method.backbone).state_dict().items())


@pytest.mark.parametrize("overrides", [["method=slca"], [*ALIGNED, "alignment.restore=true"]])
def test_restored_heads_are_those_of_training_bit_for_bit(overrides):
    """So training goes as if there were no alignment."""
    method = build(overrides)
    plain = build([*overrides, "alignment=none"] if overrides == ["method=slca"] else overrides[:1])
    if overrides == ["method=slca"]:
        plain.backbone.norm = nn.LayerNorm(toy.EMBED_DIM)  # the component's
    for task in toy.sequence():
        fits = [Fit(one, task).begin() for one in (method, plain)]
        for (name, ours), theirs in zip(method.heads.state_dict().items(), plain.heads.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        for fit in fits:
            fit.train().end()
        same = all(torch.equal(*pair) for pair in zip(method.heads.parameters(), plain.heads.parameters(), strict=True))
        assert same is (task.index == 0)
    found = {name: value for name, value in tensors(method).items() if name.startswith("backbone.")}
    assert not changed({name: value for name, value in tensors(plain).items() if name.startswith("backbone.")}, found)


def test_alignment_helps_heads_that_were_trained_apart():
    """On a task each, no head has ever seen another's classes."""

    def accuracy(overrides: list[str]) -> float:
        method = build(overrides)
        tasks = toy.sequence(6, num_classes=12, train=30)
        learn(method, tasks, epochs=3)
        y = torch.cat([y for task in tasks for _, y in task.test_batches()])
        return (scores(method, test_images(tasks)).argmax(1) == y).float().mean().item()

    plain = accuracy(["method=linear_probe"])
    assert accuracy(["method=linear_probe", "alignment=gaussian"]) > plain + 0.1


def test_the_statistics_are_those_of_the_network_right_after_each_task():
    method = build(ALIGNED)
    first, second, _ = toy.sequence()
    learn(method, [first])
    assert isinstance(method.alignment, ClassifierAlignment)
    early = method.alignment.statistics.means.clone()
    x, y = next(iter(first.batches("test", stream="any")))
    with torch.no_grad():
        torch.testing.assert_close(early[1], method.features(x)[y == 1].mean(0), rtol=1e-5, atol=1e-6)
    learn(method, [second])
    assert torch.equal(method.alignment.statistics.means[:2], early), "never taken again"
    assert not torch.equal(method.features(x)[y == 1].mean(0), early[1])
    assert len(method.diagnostics()["alignment_losses"]) == 5


def test_a_method_that_cannot_be_aligned_is_refused():
    for overrides, message in (
        (["method=joint"], "alignment=gaussian has nothing to align in Joint, which learns all classes at once; choose alignment=none"),
        (["method=fecam"], "alignment=gaussian trains linear heads, and FeCAM has other scores; choose alignment=none, or another method"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian(build(overrides), **SETTINGS, fresh_norm=False)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"epochs": 0}, "alignment.epochs=0 is too small; choose 1 or more"),
        ({"samples_per_class": 0}, "alignment.samples_per_class=0 is too small; choose 1 or more"),
        ({"lr": 0.0}, "alignment.lr=0.0 is too small; choose more than 0"),
        ({"temperature": -1.0}, "alignment.temperature=-1.0 is too small; choose more than 0"),
        ({"momentum": 1.5}, "alignment.momentum=1.5 is out of range; choose a number from 0 to 1"),
        ({"mean_scale": -0.1}, "alignment.mean_scale=-0.1 is out of range; choose a number from 0 to 1"),
        ({"weight_decay": -1.0}, "alignment.weight_decay=-1.0 is too small; choose 0 or more"),
        ({"covariance": "low"}, "alignment.covariance=low is not known; choose one of full, shared, diag"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    method = build(["method=linear_probe"])
    kind = type(method)
    with pytest.raises(ValueError, match=message):
        gaussian(method, **SETTINGS | wrong, fresh_norm=True)
    assert type(method) is kind and method.backbone.norm.eps == 1e-6, "and the method is as it was"


def test_a_backbone_without_a_final_layer_norm_keeps_it():
    method = build(["method=linear_probe"])
    method.backbone.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"alignment.fresh_norm=true replaces a LayerNorm, but this backbone ends with Identity"):
        gaussian(method, **SETTINGS, fresh_norm=True)


# ---- as a user chooses it ----------------------------------------------------------------------------------------------------------


def test_alignment_is_chosen_for_any_method_and_a_method_may_choose_it():
    assert compose_config("method=sequential").alignment == {"_target_": None}
    assert compose_config("method=sequential", "alignment=gaussian").alignment == {
        "_target_": "inflora.parts.classifier_alignment.gaussian",
        **SETTINGS,
        "fresh_norm": False,
    }
    target = compose_config("alignment=gaussian").alignment._target_
    for method, restore in (("inflora_ca", False), ("slca", True)):
        found = compose_config(f"method={method}").alignment
        assert (found._target_, found.restore, found.temperature) == (target, restore, 0.1)
        assert compose_config(f"method={method}", "alignment=none").alignment._target_ is None


@pytest.mark.usefixtures("no_report")
def test_a_run_with_alignment(tmp_path):
    plain = run_toy(tmp_path / "plain", "method=linear_probe")
    aligned = run_toy(tmp_path / "aligned", "method=linear_probe", "alignment=gaussian")
    assert aligned["accuracy_curve"][0] == plain["accuracy_curve"][0]
    assert aligned["trainable_parameters"] == plain["trainable_parameters"]
    assert aligned["stored_parameters"] == plain["stored_parameters"] + 6 * (1 + toy.EMBED_DIM + toy.EMBED_DIM**2)
    losses = [event["alignment_losses"] for event in read_events(tmp_path / "aligned", "task")]
    assert [len(found) for found in losses] == [0, 5, 5]
    assert json.loads((tmp_path / "aligned" / "summary.json").read_text())["method"] == "linear_probe"


@pytest.mark.usefixtures("no_report")
def test_a_run_of_slca_without_its_alignment(tmp_path):
    assert run_toy(tmp_path, "method=slca", "alignment=none")["stored_parameters"] == 6 * (toy.EMBED_DIM + 1)


# ---- SLCA and InfLoRA+CA -----------------------------------------------------------------------------------------------------------


def test_slca_trains_the_backbone_a_hundred_times_slower_than_the_head():
    cfg = compose_config("method=slca", "~tuning")
    method = build(["method=slca"])
    Fit(method, toy.sequence()[0]).begin()
    groups = trainable_groups(method, {"branch": cfg.optimizer.lr, "head": cfg.optimizer.head_lr})
    assert [(group["role"], group["lr"]) for group in groups] == [("branch", 1e-4), ("head", 1e-2)]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in method.backbone.parameters()}
    assert cfg.optimizer._target_ == "torch.optim.SGD" and cfg.optimizer.momentum == 0.9
    assert 0.01 < method.heads.current.weight.std() < 0.03 and not method.heads.current.bias.any()


@pytest.mark.parametrize("overrides", [["method=slca"], ["method=inflora_ca", "alignment.fresh_norm=true"]])
def test_a_fresh_norm_takes_the_place_of_the_last(overrides):
    method, other = build(overrides), build(["method=linear_probe"])
    norm = method.backbone.norm
    assert type(norm) is nn.LayerNorm and norm.eps == 1e-5
    assert torch.equal(norm.weight, torch.ones(toy.EMBED_DIM)) and not norm.bias.any()
    assert method.backbone.state_dict().keys() == other.backbone.state_dict().keys()
    assert build(["method=inflora_ca", "alignment.fresh_norm=false"]).backbone.norm.eps == 1e-6


def test_inflora_ca_is_inflora_with_the_same_component():
    method = build(["method=inflora_ca", "alignment.fresh_norm=false"])
    assert isinstance(method, InfLoRA) and type(method).__name__ == "AlignedInfLoRA"
    plain = build(["method=inflora"])
    first, _, _ = toy.sequence()
    for one in (method, plain):
        learn(one, [first])
    assert fingerprint(method.backbone.state_dict()) == fingerprint(plain.backbone.state_dict())


# ---- InfLoRA-b5 --------------------------------------------------------------------------------------------------------------------


def test_a_number_of_blocks_counts_from_the_input_and_stops_at_the_depth():
    deep = toy.vit_toy(num_classes=0, depth=7)
    assert lora.qkv_names(deep, 5) == lora.qkv_names(deep, [0, 1, 2, 3, 4])
    assert lora.qkv_names(toy.toy_vit(), 5) == lora.qkv_names(toy.toy_vit())
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"method.blocks=\[\] does not fit this backbone; choose distinct numbers from 0..1"):
            lora.qkv_names(toy.toy_vit(), wrong)


def test_inflora_b5_leaves_the_blocks_after_the_fifth_alone():
    settings = {key: value for key, value in compose_config("method=inflora_b5").method.items() if key != "_target_"}
    torch.manual_seed(0)
    method = InfLoRA(toy.vit_toy(num_classes=0, depth=7), **settings | {"rank": 2})
    start = copy.deepcopy(method.backbone.state_dict())
    learn(method, toy.sequence())
    moved = {name for name, value in method.backbone.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {f"blocks.{block}.attn.qkv.weight" for block in range(5)}
    assert len(method.memory) == 5


def test_inflora_b5_on_a_shallow_backbone_is_inflora():
    found, plain = (learn(build([f"method={name}"]), toy.sequence()) for name in ("inflora_b5", "inflora"))
    assert fingerprint(found.state_dict()) == fingerprint(plain.state_dict())


# ---- FeCAM -------------------------------------------------------------------------------------------------------------------------


def published_shrinkage(covariance: np.ndarray, alpha1: float, alpha2: float) -> np.ndarray:
    off = covariance.copy()
    np.fill_diagonal(off, 0)
    unit = np.eye(len(covariance))
    return covariance + alpha1 * np.diag(covariance).mean() * unit + alpha2 * off.sum() / (off != 0).sum() * (1 - unit)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (10.0, 10.0), (2.0, 1.0)])
@pytest.mark.parametrize("covariance", ["full", "diag", "shared"])
@pytest.mark.parametrize("tukey", [None, 0.5])
def test_fecam_scores_are_the_distances_of_the_formula(alphas, covariance, tukey):
    """In NumPy, float64, with a pseudo-inverse, one image and class at a time. Twelve images a class in 32 dimensions."""
    method = FeCAM(toy.toy_vit(), covariance=covariance, alpha1=alphas[0], alpha2=alphas[1], normalize=True, tukey=tukey).eval()
    with torch.no_grad():
        method.backbone.norm.weight.uniform_(0.5, 1.5)  # with equal weights, features add up to zero and no covariance has full rank
    tasks = toy.sequence(2, num_classes=4, train=12)
    for task in tasks:
        learn(method, [task])
        scores(method, test_images(tasks))  # a run tests after every task; what that has computed must not stay when classes come

    def prepared(x: Tensor) -> np.ndarray:
        with torch.no_grad():
            z = method.backbone(x).double().numpy()
        z = z if tukey is None else np.sign(z) * np.abs(z) ** tukey
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    x = test_images(tasks)
    batches = [batch for task in tasks for batch in task.batches("test", stream="any")]
    train, y = prepared(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]).numpy()
    within = [np.cov(train[y == c].T) for c in range(4)]
    expected = np.zeros((len(x), 4))
    for c in range(4):
        sigma = published_shrinkage(np.mean(within, axis=0) if covariance == "shared" else within[c], *alphas)
        if covariance == "diag":
            sigma = np.diag(np.diag(sigma) / np.linalg.norm(np.diag(sigma)))
        else:
            deviations = np.sqrt(np.diag(sigma))
            sigma = sigma / np.outer(deviations, deviations)
        for row, z in enumerate(prepared(x)):
            difference = z - train[y == c].mean(0)
            expected[row, c] = -difference @ np.linalg.pinv(sigma) @ difference
    np.testing.assert_allclose(scores(method, x).double().numpy(), expected, rtol=1e-3)


def test_fecam_measures_distances_in_full_precision(monkeypatch):
    method = FeCAM(toy.toy_vit(), covariance="full", alpha1=1.0, alpha2=1.0, normalize=True, tukey=None).eval()
    tasks = toy.sequence(2, num_classes=4, train=12)
    learn(method, tasks)
    x = test_images(tasks)
    with torch.no_grad():
        directions = method.directions(x)
    monkeypatch.setattr(method, "directions", lambda x: directions)
    expected = scores(method, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores(method, x), expected)


def test_shrinkage_and_correlations():
    covariance = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    found = shrunk(covariance, 1.0, 2.0)  # mean variance 2; mean of the four covariances that are not zero 0.5
    expected = torch.tensor([[6.0, 3.0, 1.0], [3.0, 3.0, 0.0], [1.0, 0.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(shrunk(covariance.diagonal(), 1.0, 2.0), expected.diagonal())
    found = correlations(expected)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found[0, 1].item(), 3 / 18**0.5)


@pytest.mark.parametrize("covariance", ["full", "diag", "shared"])
@pytest.mark.parametrize("train", [1, 2])
def test_fecam_with_one_image_a_class_and_no_shrinkage(covariance, train):
    method = FeCAM(toy.toy_vit(), covariance=covariance, alpha1=0.0, alpha2=0.0, normalize=True, tukey=None).eval()
    tasks = toy.sequence(2, num_classes=4, train=train)
    learn(method, tasks)
    x, y = next(iter(tasks[0].batches("test", stream="any")))
    found = scores(method, x)
    assert found.isfinite().all()
    assert torch.equal(found.argmax(1), y), "the images it was made of"


def test_fecam_never_answers_with_a_class_without_images():
    method = build(["method=fecam"])
    learn(method, toy.sequence())
    method.statistics.counts[3] = 0  # type: ignore[union-attr,operator,index]
    found = scores(method, test_images(toy.sequence()))
    assert (found[:, 3] == -torch.inf).all() and found[:, :3].isfinite().all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"alpha1": -1.0}, "method.alpha1=-1.0 is too small; choose 0 or more"),
        ({"alpha2": -1.0}, "method.alpha2=-1.0 is too small; choose 0 or more"),
        ({"tukey": 0.0}, "method.tukey=0.0 is out of range; choose more than 0 and at most 1, or null for no transform"),
        ({"covariance": "half"}, "method.covariance=half is not known; choose one of full, shared, diag"),
    ],
)
def test_fecam_refuses_what_makes_no_metric(wrong, message):
    settings: dict[str, Any] = {"covariance": "full", "alpha1": 1.0, "alpha2": 0.0, "normalize": True, "tukey": None}
    with pytest.raises(ValueError, match=message):
        FeCAM(toy.toy_vit(), **settings | wrong)
