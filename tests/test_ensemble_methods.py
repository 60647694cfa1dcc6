"""What defines the methods that answer with several modules at once, each checked against a slow computation of the same thing."""

import copy
from typing import Any

import pytest
import torch
import toy
from learning import Fit, build, changed, learn, scores, tensors, test_images

from inflora import lora
from inflora.methods.lae import LAE

# ---- LAE ---------------------------------------------------------------------------------------------------------------------------

LAE_VARIANTS = ["lora", "adapter"]


def lae(variant: str = "lora", **changes: Any) -> LAE:
    arguments: dict[str, Any] = {"size": 2, "first_blocks": 1.0, "freeze_epochs": 1, "ema_decay": 0.9}
    return LAE(toy.toy_vit(), variant=variant, **arguments | changes).eval()  # type: ignore[arg-type]


def frozen_copy(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


@pytest.mark.parametrize("variant", LAE_VARIANTS)
def test_lae_leaves_the_backbone_alone_until_it_trains(variant):
    x = test_images(toy.sequence())
    torch.testing.assert_close(lae(variant).features(x), toy.toy_vit().eval()(x))


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
        ({"variant": "prompt"}, "method.variant=prompt is not known; choose one of lora, adapter"),
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
