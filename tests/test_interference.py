"""The interference figures against the definition, written out with dense matrices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from inflora import lora
from inflora.interference import InterferenceProbe

D = toy.EMBED_DIM


def layer_inputs(vit: VisionTransformer, block: int, x: Tensor) -> Tensor:
    """What block `block`'s qkv projection gets, step by step: (tokens of all images, D)."""
    with torch.no_grad():
        h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        for earlier in vit.blocks[:block]:
            h = earlier(h)
        return vit.blocks[block].norm1(h).reshape(-1, D)


def direct(before: VisionTransformer, after_weights: list[Tensor], x: Tensor) -> list[float]:
    """||dW H|| / ||W H|| of keys and values, block by block, in float64."""
    found = []
    for block, new in enumerate(after_weights):
        h = layer_inputs(before, block, x).double().T
        old = before.blocks[block].attn.qkv.weight.detach()[D:].double()
        found.append(((new[D:].double() - old) @ h).norm().item() / (old @ h).norm().item())
    return found


def weights(vit: VisionTransformer) -> list[Tensor]:
    return [lora.effective_weight(block.attn.qkv) for block in vit.blocks]


def images(task: Any, limit: int | None = None) -> Tensor:
    return torch.cat([x for x, _ in task.test_batches(limit)])


def disturb(vit: VisionTransformer, scale: float, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in vit.blocks:
            weight = block.attn.qkv.weight
            weight += scale * torch.randn(weight.shape, generator=noise)


@pytest.mark.parametrize("eval_batch_size", [3, 100])
def test_the_figures_are_the_definition(eval_batch_size):
    vit = toy.toy_vit().eval()
    tasks = toy.sequence(3, eval_batch_size=eval_batch_size).tasks
    before = toy.toy_vit().eval()
    probe = InterferenceProbe()
    probe.before(vit)
    disturb(vit, 0.01)
    found = probe.after(vit, tasks[:2])
    expected = [direct(before, weights(vit), images(task)) for task in tasks[:2]]
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]


def test_two_processes_measure_what_one_does(monkeypatch):
    """Two processes in this one: each leaves its sums; those of both are the sums of one."""
    sums: list[Tensor] = []
    monkeypatch.setattr("inflora.interference.sum_over_processes", lambda tensor: sums.append(tensor.clone()) or tensor)
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        vit, task = toy.toy_vit().eval(), toy.sequence(3)[0]
        task._loading = replace(task._loading, rank=rank, world_size=world_size)
        probe = InterferenceProbe()
        probe.before(vit)
        disturb(vit, 0.01)
        probe.after(vit, [task])
    torch.testing.assert_close(sums[1] + sums[2], sums[0])


def test_a_live_branch_counts():
    vit = toy.toy_vit().eval()
    tasks = toy.sequence(2).tasks
    lora.inject(vit, lora.qkv_names(vit, [0]), 2, rows=lora.kv_rows(D))
    (branch,) = lora.branches(vit).values()
    branch.reset_lora_A()
    probe = InterferenceProbe()
    probe.before(vit)
    with torch.no_grad():
        branch.lora_B.fill_(0.1)
    found = probe.after(vit, tasks[:1])
    assert found == [pytest.approx(direct(toy.toy_vit().eval(), weights(vit), images(tasks[0])), rel=1e-5)]
    assert found[0][0] > 0 and found[0][1] == 0.0


def test_queries_do_not_count():
    vit = toy.toy_vit().eval()
    probe = InterferenceProbe()
    probe.before(vit)
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight[:D] += 1.0
    assert probe.after(vit, toy.sequence(2).tasks[:1]) is None


def test_at_most_64_images_of_each_task_take_part():
    vit = toy.toy_vit().eval()
    probe = InterferenceProbe(num_images=3)
    probe.before(vit)
    disturb(vit, 0.01)
    (task,) = toy.sequence(1).tasks
    assert task.num_test > 3
    assert probe.after(vit, [task]) == [pytest.approx(direct(toy.toy_vit().eval(), weights(vit), images(task, 3)), rel=1e-5)]
    assert InterferenceProbe().num_images == 64


def test_a_backbone_in_training_mode_is_measured_without_dropout():
    vit = toy.toy_vit().train()
    vit.pos_drop.p = 0.5
    probe = InterferenceProbe()
    probe.before(vit)
    disturb(vit, 0.01)
    (task, _) = toy.sequence(2).tasks
    assert probe.after(vit, [task]) == [pytest.approx(direct(toy.toy_vit().eval(), weights(vit), images(task)), rel=1e-5)]
    assert vit.training


def test_nothing_to_measure():
    vit = toy.toy_vit().eval()
    tasks = toy.sequence(2).tasks
    probe = InterferenceProbe()
    assert probe.after(vit, []) is None, "also where nothing was remembered: a run may continue inside its first task"
    probe.before(vit)
    assert probe.after(vit, tasks[:1]) is None, "the weights did not change"


def test_a_measurement_changes_nothing():
    vit = toy.toy_vit().eval()
    start = toy.toy_vit().state_dict()
    probe = InterferenceProbe()
    probe.before(vit)
    disturb(vit, 0.01)
    disturbed = {name: value.clone() for name, value in vit.state_dict().items()}
    tasks = toy.sequence(2).tasks
    first = probe.after(vit, tasks[:1])
    assert probe.after(vit, tasks[:1]) == first
    assert all(torch.equal(value, disturbed[name]) for name, value in vit.state_dict().items())
    assert not any(module._forward_pre_hooks for module in vit.modules())
    assert not torch.equal(start["blocks.0.attn.qkv.weight"], disturbed["blocks.0.attn.qkv.weight"])
