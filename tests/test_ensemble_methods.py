"""What defines the methods that answer with several modules at once, each checked against a slow computation of the same thing."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from learning import Fit, build, changed, learn, scores, tensors, test_images
from torch import Tensor

from inflora import lora
from inflora.methods.cl_lora import CLLoRA, orthonormal_rows
from inflora.methods.lae import LAE
from inflora.methods.mos import MOS, retrieve
from inflora.methods.tuna import TUNA, UNIVERSAL, fused, surest
from inflora.parts import adapters
from inflora.parts.contrast import contrastive
from inflora.trainer import trainable_groups

# ---- LAE ---------------------------------------------------------------------------------------------------------------------------

LAE_VARIANTS = ["lora", "adapter", "prefix"]


def lae(variant: str = "lora", **changes: Any) -> LAE:
    arguments: dict[str, Any] = {"size": 2, "first_blocks": 1.0, "freeze_epochs": 1, "ema_decay": 0.9}
    return LAE(toy.toy_vit(), variant=variant, **arguments | changes).eval()  # type: ignore[arg-type]


def frozen_copy(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


@pytest.mark.parametrize("variant", ["lora", "adapter"])
def test_lae_leaves_the_backbone_alone_until_it_trains(variant):
    x = test_images(toy.sequence())
    torch.testing.assert_close(lae(variant).features(x), toy.toy_vit().eval()(x))


def test_lae_adapter_is_the_formula():
    """attention(x) + scale up(gelu(down(x))), of the attention's own input."""
    method, x = lae("adapter"), torch.randn(3, 17, toy.EMBED_DIM)
    attention: Any = method.backbone.blocks[0].attn  # type: ignore[index, union-attr]
    adapter = attention.adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        inside = x @ adapter.down.weight.T + adapter.down.bias
        inside = inside * (1 + torch.erf(inside / 2**0.5)) / 2
        plain: Any = toy.toy_vit().eval()
        expected = plain.blocks[0].attn(x) + adapter.scale * (inside @ adapter.up.weight.T + adapter.up.bias)
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", LAE_VARIANTS)
def test_lae_offline_module_is_the_moving_average_of_all_steps(variant):
    """The formula, unrolled in float64 over the online modules that the steps left behind."""
    method = lae(variant, freeze_epochs=0)
    tasks = list(toy.sequence())
    learn(method, tasks[:1])
    fit = Fit(method, tasks[1]).begin()
    expected = {name: value.double() for name, value in frozen_copy(method.online).items()}
    assert all(torch.equal(method.offline.tensors[name], value.float()) for name, value in expected.items()), (
        "it starts as the first task's"
    )
    step, after_step = 0, method.after_step

    def follow() -> None:
        nonlocal expected, step
        expected = {name: 0.9 * value + 0.1 * method.online[name].detach().double() for name, value in expected.items()}
        step += 1
        after_step()

    method.after_step = follow  # type: ignore[method-assign]
    fit.train(epochs=2)
    assert step > 2
    for name, value in expected.items():
        torch.testing.assert_close(method.offline.tensors[name], value.float(), rtol=0, atol=1e-6)
        assert not torch.equal(method.offline.tensors[name], method.online[name])


def test_lae_heads_start_small():
    method = lae()
    Fit(method, toy.sequence(1, num_classes=60)[0]).begin()
    assert 8e-4 < method.heads.current.weight.std() < 1.2e-3
    assert not method.heads.current.bias.any()


def test_lae_offline_module_stays_while_the_online_one_is_frozen():
    method = lae(freeze_epochs=2)
    tasks = list(toy.sequence())
    learn(method, tasks[:1])
    fit = Fit(method, tasks[1]).begin()
    before, online = frozen_copy(method.offline.tensors), frozen_copy(method.online)
    fit.train(epochs=2)
    assert all(torch.equal(before[name], value) for name, value in method.offline.tensors.items())
    assert all(torch.equal(online[name], value) for name, value in method.online.items())
    fit.train(epochs=3)  # the third epoch is the first in which it trains
    assert all(not torch.equal(online[name], value) for name, value in method.online.items())
    assert all(not torch.equal(before[name], value) for name, value in method.offline.tensors.items())


def test_lae_offline_module_goes_on_following_a_frozen_one_from_the_third_task_on():
    """The official code averages after every step: what the second task left of the distance shrinks by the decay, step by step."""
    method = lae(freeze_epochs=1)
    tasks = list(toy.sequence())
    learn(method, tasks[:2], epochs=2)
    distance = {name: (method.online[name] - old).detach() for name, old in frozen_copy(method.offline.tensors).items()}
    steps = len(tasks[2].batches("train", stream="fit"))
    Fit(method, tasks[2]).begin().train(epochs=1)
    for name, old in method.offline.tensors.items():
        torch.testing.assert_close(method.online[name] - old, distance[name] * 0.9**steps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", LAE_VARIANTS)
def test_lae_first_task_has_neither_freeze_nor_ensemble(variant):
    method = lae(variant, freeze_epochs=5)
    tasks = toy.sequence()
    fit = Fit(method, tasks[0]).begin()
    before = frozen_copy(method.online)
    fit.train().end()
    assert all(not torch.equal(before[name], value) for name, value in method.online.items() if "lora_A" not in name and "down" not in name)
    x = test_images(tasks)
    found = scores(method, x)
    torch.testing.assert_close(found, method.heads(method.features(x)).softmax(1).detach())
    for value in method.offline.tensors.values():
        value.fill_(torch.nan)
    assert torch.equal(scores(method, x), found)


@pytest.mark.parametrize("variant", LAE_VARIANTS)
def test_lae_score_is_the_larger_of_two_probabilities(variant):
    """Against a second network whose module was overwritten by hand."""
    method = lae(variant, freeze_epochs=0)
    tasks = toy.sequence()
    learn(method, tasks, epochs=3)
    other = copy.deepcopy(method)
    with torch.no_grad():
        for name, parameter in other.online.items():
            parameter.copy_(method.offline.tensors[name])
    x = test_images(tasks)
    with torch.no_grad():
        online, offline = (one.heads(one.features(x)).softmax(1) for one in (method, other))
        torch.testing.assert_close(method.offline.call(method.backbone, x), other.features(x))
    found = scores(method, x)
    torch.testing.assert_close(found, torch.stack([online, offline]).amax(0))
    assert (found.sum(1) > 1 + 1e-6).any(), "no probabilities any more"
    assert (found > online).any() and (found > offline).any(), "each module is the surer one somewhere"


def test_lae_prefix_weights_are_divided_by_their_sum():
    """Attention written out token by token: what goes to the prefix adds up to one, what goes to the tokens is left as it was."""
    method = lae("prefix", size=3)
    prefix: Any = method.backbone.blocks[0].attn  # type: ignore[index, union-attr]
    with torch.no_grad():
        prefix.tokens.normal_()
        prefix.scale.copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
    attn, x = prefix.attn, torch.randn(2, 5, toy.EMBED_DIM)
    qkv = attn.qkv(x).reshape(2, 5, 3, 2, 16)  # two heads of 16 channels
    expected = torch.zeros(2, 5, 2, 16)
    for image in range(2):
        for head in range(2):
            keys = torch.cat([0.5 * prefix.tokens[0].reshape(3, 2, 16)[:, head], qkv[image, :, 1, head]])
            values = torch.cat([2.0 * prefix.tokens[1].reshape(3, 2, 16)[:, head], qkv[image, :, 2, head]])
            for token in range(5):
                weights = (keys @ qkv[image, token, 0, head] / 4).exp()
                weights = weights / weights.sum()
                weights = torch.cat([weights[:3] / weights[:3].sum(), weights[3:]])
                expected[image, token, head] = weights @ values
    torch.testing.assert_close(prefix(x), attn.proj(expected.flatten(2)))
    assert prefix.prefix is None, "nothing of the images stays"


def test_lae_adapts_the_first_blocks_and_scales_each_product():
    method = lae(first_blocks=0.4167)
    assert list(lora.branches(method.backbone)) == ["blocks.0.attn.qkv"]
    (branch,) = lora.branches(method.backbone).values()
    with torch.no_grad():
        branch.lora_B.normal_()
        whole = lora.delta_weight(branch)
        branch.scale.copy_(torch.tensor([2.0, 0.0]))  # type: ignore[union-attr]
    key, value = lora.kv_rows(toy.EMBED_DIM)
    torch.testing.assert_close(lora.delta_weight(branch)[key], 2 * whole[key])
    assert not lora.delta_weight(branch)[value].any()


def test_lae_trains_the_published_number_of_parameters():
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = LAE(vit, variant="lora", size=5, first_blocks=0.4167, freeze_epochs=3, ema_decay=0.9999)
    assert sum(p.numel() for p in method.online.values()) == 5 * 2 * (2 * 768 * 5 + 1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"variant": "prompt"}, "method.variant=prompt is not known; choose one of lora, adapter, prefix"),
        ({"size": 0}, "method.size=0 does not fit this backbone; choose 1..32"),
        ({"size": 33}, "method.size=33 does not fit this backbone; choose 1..32"),
        ({"first_blocks": 0.0}, "method.first_blocks=0.0 is no share of the blocks; choose above 0 and at most 1"),
        ({"first_blocks": 2}, "method.first_blocks=2 is no share of the blocks"),
        ({"freeze_epochs": -1}, "method.freeze_epochs=-1 is below 0; choose 0 or more"),
        ({"ema_decay": 1.5}, "method.ema_decay=1.5 is out of range; choose 0..1"),
    ],
)
def test_lae_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        lae(**wrong)


def test_lae_online_module_is_declared_and_nothing_of_the_offline_one():
    method = lae()
    Fit(method, toy.sequence()[0]).begin()
    declared = {id(p) for group in method.param_groups() for p in group["params"]}
    assert {id(p) for p in method.online.values()} <= declared
    assert not declared & {id(value) for value in method.offline.tensors.values()}
    assert not changed(tensors(build(["method=lae"])), tensors(build(["method=lae"]))), "the same seed gives the same modules"


# ---- CL-LoRA -----------------------------------------------------------------------------------------------------------------------


def cl_lora(backbone: Any = None, **changes: Any) -> CLLoRA:
    arguments = {"rank": 3, "shared_blocks": 0.5, "distillation_weight": 5.0, "temperature": 2.0, "orthogonality": 0.1}
    return CLLoRA(toy.toy_vit() if backbone is None else backbone, **arguments | changes).eval()  # type: ignore[arg-type]


def some_batch(task: Any) -> tuple[Tensor, Tensor]:
    return next(iter(task.batches("train", stream="any")))


def test_orthonormal_rows():
    rows = orthonormal_rows((2, 3, 32)).double()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), rtol=0, atol=1e-6)


def test_cl_lora_shared_factors_are_orthonormal_and_frozen():
    method = cl_lora()
    (branch,) = lora.branches(method.early).values()
    start = branch.lora_A.clone()
    query, value = start.double()
    for rows in (query, value):
        torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.equal(query, value), "each projection has its own"
    assert [(rows.start, rows.stop) for rows in branch.rows] == [(0, 32), (64, 96)], "queries and values"
    learn(method, toy.sequence())
    assert torch.equal(branch.lora_A, start)
    assert branch.lora_B.any()


def test_cl_lora_starts_every_task_with_a_fresh_path_and_the_old_shared_branch():
    method = cl_lora()
    for task in toy.sequence():
        shared, before_task = frozen_copy(method.shared), next(iter(lora.branches(method.late).values())).scale.detach().clone()  # type: ignore[union-attr]
        Fit(method, task).begin()
        (branch,) = lora.branches(method.late).values()
        for rows in branch.lora_A.double():
            torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        assert not branch.lora_B.any()
        assert branch.scale is not None and (branch.scale >= 0.5).all() and (branch.scale <= 1.5).all()
        assert (branch.scale - before_task).abs().min() > 1e-4, "drawn anew"
        assert all(torch.equal(shared[name], value) for name, value in method.shared.items())
        assert all(torch.equal(shared[name], value) for name, value in method.teacher.tensors.items())
        Fit(method, task).train().end()


def test_cl_lora_compares_block_weights_with_the_mean_of_the_older_tasks():
    method = cl_lora()
    tasks = toy.sequence()
    learn(method, tasks.tasks[:2])
    Fit(method, tasks[2]).begin()
    (branch,) = lora.branches(method.late).values()
    with torch.no_grad():
        branch.scale.copy_(torch.tensor([1.0, 2.0]))  # type: ignore[union-attr]
        for path, weights in zip(method.paths, ([-3.0, 1.0], [2.0, 1.0]), strict=True):
            next(value for name, value in path.tensors.items() if name.endswith("scale")).copy_(torch.tensor(weights))  # type: ignore[operator, union-attr]
    expected = (1 / (5**0.5 * 10**0.5) + 4 / (5**0.5 * 5**0.5)) / 2
    assert method.block_weight_overlap().item() == pytest.approx(expected)


def test_cl_lora_distils_first_and_then_learns_with_the_images_passed_again():
    """Both steps of one batch by hand, on a copy of the network: plain SGD, so that a step is the gradient."""
    method = cl_lora()
    tasks = toy.sequence()
    learn(method, [tasks[0]], epochs=2)
    Fit(method, tasks[1]).begin()
    old = copy.deepcopy(method)
    x, y = some_batch(tasks[1])
    groups = trainable_groups(method, {"branch": 0.1, "head": 0.1})
    with torch.no_grad():
        for parameter in method.shared.values():
            parameter.add_(0.1 * torch.rand(parameter.shape))  # else the first loss has no gradient: teacher and student are one
    by_hand = copy.deepcopy(method)
    optimizer = torch.optim.SGD(groups)
    losses = method.loss(x, y)

    first = next(losses)
    assert by_hand.classifier is not None
    blocks: Any = by_hand.backbone.blocks

    def early_scores(network: Any) -> Tensor:
        tokens = network.backbone.blocks[0](network.embed(x))
        return by_hand.classifier(network.backbone.norm(tokens)[:, 0])  # type: ignore[misc]

    targets = (early_scores(old) / 2).softmax(1)
    expected = -5 * (targets * (early_scores(by_hand) / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(first, expected)
    optimizer.zero_grad()
    first.backward()
    expected.backward()
    assert all(value.grad is None for value in method.own.values()), "the late blocks take no part in this step"
    with torch.no_grad():
        shared, before = blocks[0].attn.qkv.lora_B, old.shared["0.attn.qkv.lora_B"]
        for part in range(2):
            norms = [before[part, row].norm() for row in range(32)]
            for row in range(32):
                shared[part, row] -= 0.1 * shared.grad[part, row] * 32 * norms[row] / sum(norms)
        for value in by_hand.classifier.parameters():
            value -= 0.1 * value.grad  # type: ignore[operator]
    optimizer.step()
    for name, value in method.shared.items():
        torch.testing.assert_close(value, by_hand.shared[name], rtol=0, atol=1e-6)

    second = next(losses)
    scores = by_hand.classifier(by_hand.backbone(x))
    weights = [torch.cat([value for name, value in own.items() if "scale" in name]) for own in (by_hand.own, method.paths[0].tensors)]  # type: ignore[operator, union-attr]
    overlap = (weights[0] @ weights[1]).abs() / (weights[0].norm() * weights[1].norm())
    torch.testing.assert_close(second, F.cross_entropy(scores, y - 2) + 0.1 * overlap)
    assert next(losses, None) is None
    optimizer.zero_grad()
    second.backward()
    plain = torch.autograd.grad(F.cross_entropy(scores, y - 2), shared)[0]
    torch.testing.assert_close(method.shared["0.attn.qkv.lora_B"].grad, plain, rtol=1e-4, atol=1e-6)  # no row is reassigned here


def test_cl_lora_first_task_is_plain_cross_entropy():
    method = cl_lora()
    task = toy.sequence()[0]
    Fit(method, task).begin()
    x, y = some_batch(task)
    (only,) = method.loss(x, y)
    torch.testing.assert_close(only, F.cross_entropy(method.classifier(method.features(x)), y))  # type: ignore[misc]


def test_cl_lora_reassigns_nothing_where_nothing_was_learned():
    method = cl_lora()
    Fit(method, toy.sequence()[0]).begin()
    (parameter,), (same,) = method.shared.values(), method.reassigned().values()
    assert torch.equal(same, parameter)
    same.square().add(same).sum().backward()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))  # type: ignore[arg-type]


def test_cl_lora_scores_each_class_in_its_own_path():
    """Paths put into the network by hand, means taken image by image when their task had just been learned."""
    method = cl_lora()
    tasks = toy.sequence()
    paths, means = [], []
    for task in tasks:
        learn(method, [task], epochs=2)
        paths.append(frozen_copy(method.own))
        with torch.no_grad():
            (x, y), *rest = task.batches("test", stream="any")
            assert not rest
            features = torch.cat([method.backbone(image.unsqueeze(0)) for image in x])
            means += [features[y == label].mean(0) for label in y.unique()]
    assert any(not torch.equal(paths[0][name], paths[1][name]) for name in paths[0])
    x = test_images(tasks)
    found = scores(method, x)
    with torch.no_grad():
        for label, mean in enumerate(means):
            for name, value in paths[label // 2].items():
                method.own[name].copy_(value)
            torch.testing.assert_close(found[:, label], F.cosine_similarity(method.backbone(x), mean.unsqueeze(0)))


def test_cl_lora_trains_the_published_number_of_parameters():
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = cl_lora(vit, rank=8)
    assert method.num_shared == 6
    assert sum(p.numel() for p in method.shared.values()) == 6 * 2 * 768 * 8
    assert sum(p.numel() for p in method.own.values()) == 6 * (4 * 768 * 8 + 2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rank": 33}, "method.rank=33 exceeds the layer's 32 inputs; choose 1..32"),
        ({"shared_blocks": 1.0}, "method.shared_blocks=1.0 does not divide 2 blocks; choose a share above 0 and below 1"),
        ({"orthogonality": -1.0}, "method.orthogonality=-1.0 is negative; choose 0 or more"),
        ({"temperature": 0.0}, "method.temperature=0.0 is not above 0"),
        ({"distillation_weight": -1.0}, "method.distillation_weight=-1.0 is negative"),
    ],
)
def test_cl_lora_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        cl_lora(**wrong)


def test_cl_lora_leaves_the_mode_of_the_network_as_it_was():
    method = cl_lora()
    tasks = toy.sequence()
    learn(method, list(tasks)[:2])
    scores(method, test_images(tasks))
    assert not any(module.training for module in method.modules())
    Fit(method, tasks[2]).begin()
    method.train()
    for _ in method.loss(*some_batch(tasks[2])):
        assert all(module.training for module in method.backbone.modules())


# ---- TUNA --------------------------------------------------------------------------------------------------------------------------

ADAPTER = {"bottleneck": 4, "adapter_scale": 1.0, "dropout": 0.0}
ALIGNMENT = {"epochs": 2, "samples_per_class": 8, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "covariance": "full"}


def tuna(**changes: Any) -> TUNA:
    arguments = {**ADAPTER, "scale": 20.0, "margin": 0.0, "orthogonality": 1.0, "alignment": {**ALIGNMENT, "mean_scale": 1.0}}
    return TUNA(toy.toy_vit(), **arguments | changes).eval()  # type: ignore[arg-type]


def test_fusion_elects_the_sign_of_the_mean_and_the_largest_that_agrees():
    values = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    values[:, 0, 0] = torch.tensor([3.0, -1.0, -1.0, -0.5, -0.1])  # one large value outvotes four
    values[:, 0, 1] = torch.tensor([1.0, -2.0, 1.0, -1.0, 0.5])  # the mean is negative though most are positive
    found = fused(values)
    for row in range(7):
        for column in range(3):
            own = values[:, row, column].tolist()
            sign = 1 if sum(own) > 0 else -1
            assert found[row, column] == sign * max(abs(value) for value in own if value * sign > 0)
    assert found[0, 0] == 3 and found[0, 1] == -2
    assert torch.equal(fused(values[:1]), values[0]), "of one task, its own"


def test_tuna_universal_adapters_are_fused_from_those_of_all_tasks():
    method = tuna()
    tasks = toy.sequence()
    for task in tasks:
        learn(method, [task], epochs=2)
        for block, universal in enumerate(adapters.adapter_set(method.backbone, UNIVERSAL)):
            own = [dict(method.task_set(t)[block].named_parameters()) for t in range(task.index + 1)]
            for name, value in universal.named_parameters():
                torch.testing.assert_close(value, fused(torch.stack([one[name].detach() for one in own])))
                assert value.abs().max() > 0


def test_the_surest_row_of_each_image():
    probabilities = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0)).softmax(2)
    found = surest(probabilities)
    chosen = set()
    for image in range(9):
        entropies = [float(torch.distributions.Categorical(probs=probabilities[task, image]).entropy()) for task in range(4)]
        task = entropies.index(min(entropies))
        chosen.add(task)
        assert torch.equal(found[image], probabilities[task, image])
    assert len(chosen) > 1, "images choose for themselves"


def test_tuna_score_is_that_of_the_surest_task_plus_the_universal_one():
    """Image by image, with the adapters of one set after the other copied into one network by hand."""
    method = tuna()
    tasks = toy.sequence()
    learn(method, tasks, epochs=3)
    hand = copy.deepcopy(method)
    x = test_images(tasks)

    @torch.no_grad()
    def probabilities(image: Tensor, index: int) -> Tensor:
        for target, value in zip(hand.task_set(2), adapters.adapter_set(method.backbone, index), strict=True):
            target.load_state_dict(value.state_dict())
        feature = hand.backbone(image.unsqueeze(0))
        directions = torch.cat(list(method.heads.parameters()))
        return torch.cat([20 * F.cosine_similarity(feature, direction.unsqueeze(0)) for direction in directions]).softmax(0)

    found = scores(method, x)
    for image, score in zip(x[::3], found[::3], strict=True):
        rows = [probabilities(image, 1 + task) for task in range(3)]
        entropies = [-(row * row.log()).sum() for row in rows]
        specific = rows[int(torch.stack(entropies).argmin())]
        torch.testing.assert_close(score, specific + probabilities(image, UNIVERSAL), rtol=1e-4, atol=1e-5)


def test_tuna_loss_is_the_margin_softmax_plus_the_overlap():
    method = tuna(margin=0.3, orthogonality=2.0)
    tasks = list(toy.sequence())
    learn(method, tasks[:2], epochs=2)
    Fit(method, tasks[2]).begin().train()
    x, y = some_batch(tasks[2])
    weight = method.heads.current.weight
    feature = method.features(x)
    expected = torch.zeros(())
    for row, label in zip(feature, (y - 4).tolist(), strict=True):
        cosines = [F.cosine_similarity(row, direction, dim=0) for direction in weight]
        logits = [20 * (value - 0.3 * (index == label)) for index, value in enumerate(cosines)]
        expected = expected - logits[label] + torch.stack(logits).logsumexp(0)
    expected = expected / len(y)
    for old in range(2):
        for block in range(2):
            new_up, old_up = (F.normalize(method.task_set(task)[block].up.weight, dim=1) for task in (2, old))
            expected = expected + 2 * torch.tensor(-3.0).exp() * (new_up @ old_up.T).mean().abs() / 2
    torch.testing.assert_close(method.loss(x, y), expected)


def test_tuna_task_starts_from_the_adapters_of_the_last_one():
    method = tuna()
    tasks = list(toy.sequence())
    learn(method, tasks[:1])
    Fit(method, tasks[1]).begin()
    for new, old in zip(method.task_set(1), method.task_set(0), strict=True):
        assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())
    frozen = [frozen_copy(dict(adapter.named_parameters())) for adapter in method.task_set(0)]
    Fit(method, tasks[1]).train().end()
    for before, adapter in zip(frozen, method.task_set(0), strict=True):
        assert all(torch.equal(before[name], value) for name, value in adapter.named_parameters())


def test_tuna_aligns_directions_of_all_heads_from_the_second_task_on():
    method = tuna(alignment={**ALIGNMENT, "mean_scale": 0.9, "epochs": 20})
    tasks = list(toy.sequence())
    learn(method, tasks[:1], epochs=2)
    assert not method.alignment.losses
    first = method.heads.heads[0].weight.clone()  # type: ignore[operator, union-attr]
    learn(method, tasks[1:2], epochs=2)
    assert not torch.equal(method.heads.heads[0].weight, first)  # type: ignore[arg-type, union-attr]
    assert method.alignment.losses[-1] < method.alignment.losses[0]


@pytest.mark.parametrize("make, newest", [(lambda: mos(), 1), (lambda: tuna(), 2)])
def test_alignment_draws_all_classes_seen_from_their_features_and_scores_as_the_heads_do(make, newest, monkeypatch):
    method, tasks = make(), list(toy.sequence())
    learn(method, tasks[:1], epochs=2)
    asked = []

    def fit(parameters: Any, score: Any, sizes: list[int]) -> list[Tensor]:
        assert sizes == [2, 2] and (method.alignment.statistics.counts > 0).tolist() == [True] * 4
        with torch.no_grad():
            torch.testing.assert_close(score(features := torch.randn(5, toy.EMBED_DIM)), method.heads(features))
        asked.append(score)
        return [parameter.detach() for parameter in parameters]

    monkeypatch.setattr(method.alignment, "fit", fit)
    learn(method, tasks[1:2], epochs=2)
    assert len(asked) == 1
    batches = list(tasks[1].batches("test", stream="any"))
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    for label in (2, 3):
        with torch.no_grad(), adapters.active(method.backbone, newest):
            torch.testing.assert_close(method.alignment.statistics.means[label], method.features(x[y == label]).mean(0))


@pytest.mark.parametrize("name", ["aper", "ease", "mos", "ranpac", "tuna"])
def test_adapters_have_the_scale_and_dropout_that_were_set(name):
    method = build([f"method={name}", "method.adapter_scale=0.7", "method.dropout=0.3"])
    Fit(method, toy.sequence()[0]).begin()
    found = [module for module in method.modules() if isinstance(module, adapters.Adapter)]
    assert found
    assert {(module.scale, module.dropout.p) for module in found} == {(0.7, 0.3)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bottleneck": 0}, "method.bottleneck=0 is below 1; choose 1 or more"),
        ({"scale": 0.0}, "method.scale=0.0 is not above 0; choose a positive number, such as 20"),
        ({"margin": -0.1}, "method.margin=-0.1 is negative; choose 0 or more"),
        ({"orthogonality": -1.0}, "method.orthogonality=-1.0 is negative; choose 0 or more"),
        ({"alignment": {**ALIGNMENT, "epochs": 0, "mean_scale": 1.0}}, "alignment.epochs=0 is too small; choose 1 or more"),
    ],
)
def test_tuna_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        tuna(**wrong)


# ---- MOS ---------------------------------------------------------------------------------------------------------------------------


def mos(**changes: Any) -> MOS:
    arguments = {**ADAPTER, "momentum": 0.1, "contrast": 0.1, "retrieval_steps": 4, "alignment": ALIGNMENT}
    return MOS(toy.toy_vit(), **arguments | changes).eval()  # type: ignore[arg-type]


def test_mos_merges_the_older_adapters_in_after_every_step():
    """Two steps of plain SGD by hand: a step along the gradient, then a tenth of the way to the mean of the older tasks' adapters."""
    method = mos()
    tasks = list(toy.sequence())
    learn(method, tasks[:2], epochs=2)
    Fit(method, tasks[2]).begin()
    optimizer = torch.optim.SGD(trainable_groups(method, {"branch": 0.1, "head": 0.1}))
    older = [(a + b).detach() / 2 for a, b in zip(method.set_parameters(0), method.set_parameters(1), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(method.set_parameters(2), method.set_parameters(1), strict=True)), "starts as the last"
    x, y = some_batch(tasks[2])
    for _ in range(2):
        optimizer.zero_grad()
        method.loss(x, y).backward()
        expected = [0.9 * (p - 0.1 * p.grad) + 0.1 * mean for p, mean in zip(method.set_parameters(2), older, strict=True)]  # type: ignore[operator]
        optimizer.step()
        method.after_step()
        for found, value in zip(method.set_parameters(2), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-6)
    method.load_state_dict(copy.deepcopy(method.state_dict()))
    assert all(torch.allclose(a, b) for a, b in zip(method.older_mean, older, strict=True)), "also in a run that goes on"


def test_mos_merges_nothing_in_the_first_task():
    method = mos()
    Fit(method, toy.sequence()[0]).begin().train()
    before = [value.detach().clone() for value in method.set_parameters(0)]
    method.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, method.set_parameters(0), strict=True))


def slow_retrieval(scores: Tensor, start: int, task_of: list[int], steps: int) -> Tensor:
    """One image, (tasks, C), as one would say it."""
    task, passes = start, 0
    while True:
        passes += 1
        named = task_of[int(scores[task].argmax())]
        if named == task or passes == steps:
            return scores[task]
        task = named


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_retrieval_follows_each_image_by_itself(steps):
    task_of = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    scores = torch.randn(60, 5, 8, generator=torch.Generator().manual_seed(0))
    start = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
    found = retrieve(scores, start, task_of, steps)
    ends = set()
    for image in range(60):
        expected = slow_retrieval(scores[image], int(start[image]), task_of.tolist(), steps)
        assert torch.equal(found[image], expected)
        ends.add(torch.equal(expected, scores[image, start[image]]))
    assert ends == ({True} if steps == 1 else {True, False}), "some stay and some leave"


def test_mos_score_against_a_loop_over_images():
    method = mos(momentum=0.0)
    tasks = toy.sequence()
    learn(method, tasks, epochs=3)
    task_of = [0, 0, 1, 1, 2, 2]
    means = []
    for task in tasks:
        for x, y in task.batches("test", stream="any"):
            with adapters.active(method.backbone, 0), torch.no_grad():
                features = method.backbone(x)
            means += [features[y == label].mean(0) for label in y.unique()]
    x = test_images(tasks)
    found = scores(method, x)
    for image, score in zip(x[::2], found[::2], strict=True):
        with torch.no_grad():
            features = [method.set_features(image.unsqueeze(0), task)[0] for task in range(3)]
            first = torch.stack([F.cosine_similarity(features[0], mean, dim=0) for mean in means])
            rows = torch.stack([method.heads(feature.unsqueeze(0))[0] for feature in features])
            expected = slow_retrieval(rows, task_of[int(first.argmax())], task_of, 4).softmax(0) + (3 * first).softmax(0)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_mos_contrast_tells_features_and_old_means_apart():
    features, means = torch.randn(5, 8), torch.randn(3, 8)
    rows = [*means, *features]
    expected = [(torch.stack([row @ other for other in rows]) / 0.8).logsumexp(0) - row @ row / 0.8 for row in rows]
    torch.testing.assert_close(contrastive(features, means), torch.stack(expected).mean())

    method = mos(contrast=2.0)
    tasks = toy.sequence()
    learn(method, [tasks[0]])
    Fit(method, tasks[1]).begin()
    x, y = some_batch(tasks[1])
    features = method.features(x)
    plain = F.cross_entropy(method.heads.current(features), y - 2)
    torch.testing.assert_close(method.loss(x, y), plain + 2 * contrastive(features, method.alignment.statistics.means))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bottleneck": 0}, "method.bottleneck=0 is below 1; choose 1 or more"),
        ({"momentum": 1.5}, "method.momentum=1.5 is out of range; choose 0..1"),
        ({"contrast": -1.0}, "method.contrast=-1.0 is negative; choose 0 or more"),
        ({"retrieval_steps": 0}, "method.retrieval_steps=0 is below 1; choose 1 or more"),
    ],
)
def test_mos_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        mos(**wrong)
