"""Adapters parallel to the MLPs and SSF's scales and shifts, on the toy vision transformer."""

import copy
from typing import Any, cast

import pytest
import timm
import torch
import toy
from torch import Tensor, nn

from inflora import lora
from inflora.parts import adapters


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, toy.IMAGE_SIZE, toy.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def trained(found: list[adapters.Adapter], seed: int = 0) -> list[adapters.Adapter]:
    """The same adapters with every number drawn anew, as if they had learned something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in found:
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found


def inject(vit: nn.Module, **changes: Any) -> list[adapters.Adapter]:
    return adapters.inject(vit, **{"bottleneck": 4, "scale": 0.5, "dropout": 0.0} | changes)


def test_a_fresh_adapter_changes_nothing():
    vit = toy.toy_vit().eval()
    before = vit(images())
    assert len(inject(vit)) == 2
    assert torch.equal(vit(images()), before)


def test_an_adapter_starts_kaiming_uniform_and_zero():
    (adapter, _) = inject(toy.toy_vit(), bottleneck=16)
    bound = toy.EMBED_DIM**-0.5
    assert 0.9 * bound < adapter.down.weight.abs().max() <= bound
    assert not adapter.down.bias.any() and not adapter.up.weight.any() and not adapter.up.bias.any()


def test_an_adapted_block_is_the_formula():
    """y = x + ls1(attn(norm1(x))), z = y + ls2(MLP(norm2(y))) + scale up(relu(down(y))): a layer scale does not touch the adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = toy.vit_toy(num_classes=0, init_values=0.3).eval()
    (adapter, _) = trained(inject(vit))
    x = torch.randn(2, 17, toy.EMBED_DIM)
    block = cast(Any, vit.blocks[0])
    y = x + 0.3 * block.attn(block.norm1(x))
    bottleneck = (y @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    expected = y + 0.3 * block.mlp(block.norm2(y)) + 0.5 * (bottleneck @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_a_dropped_path_does_not_drop_the_adapter():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = toy.vit_toy(num_classes=0)
    for block in cast(Any, vit.blocks):
        block.drop_path1, block.drop_path2 = nn.Dropout(1.0), nn.Dropout(1.0)  # every path dropped: x goes through unchanged
    (adapter, _) = trained(inject(vit))
    x = torch.randn(2, 17, toy.EMBED_DIM)
    torch.testing.assert_close(cast(Any, vit.blocks[0])(x), x + adapter(x))


def test_dropout_is_for_training_only():
    vit = toy.toy_vit()
    (adapter, _) = trained(inject(vit, dropout=0.5))
    x = torch.randn(300, toy.EMBED_DIM)  # of three, two draws of the few active units may well be the same
    assert not torch.equal(adapter(x), adapter(x))
    vit.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_what_is_dropped_is_the_bottleneck():
    vit = toy.toy_vit()
    (adapter, _) = trained(inject(vit, bottleneck=1, dropout=0.5))
    x = torch.randn(50, toy.EMBED_DIM)
    x = x[(adapter.down(x) > 0.1).flatten()]
    found = adapter(x)
    nothing = (0.5 * adapter.up.bias).expand_as(found)
    doubled = 0.5 * (2 * adapter.down(x) @ adapter.up.weight.T + adapter.up.bias)
    is_dropped = (found == nothing).all(dim=1, keepdim=True)
    assert is_dropped.any() and not is_dropped.all()
    torch.testing.assert_close(found, torch.where(is_dropped, nothing, doubled))


def test_sets_are_switched():
    vit = toy.toy_vit().eval()
    plain = vit(images())
    trained(inject(vit), seed=0)
    first = vit(images())
    trained(inject(vit), seed=1)
    second = vit(images())
    assert adapters.num_sets(vit) == 2
    assert not torch.equal(first, plain) and not torch.equal(first, second)
    for index, expected in ((0, first), (None, plain), (1, second)):
        adapters.activate(vit, index)
        assert torch.equal(vit(images()), expected)
    with adapters.active(vit, 0):
        assert torch.equal(vit(images()), first)
        with adapters.active(vit, None):
            assert torch.equal(vit(images()), plain)
    assert torch.equal(vit(images()), second)


def test_a_set_in_some_blocks():
    vit = toy.toy_vit()
    assert len(inject(vit, blocks=[1])) == 1
    assert [type(block) is adapters.AdaptedBlock for block in cast(Any, vit.blocks)] == [False, True]


def test_names_and_weights_stay_and_removing_restores():
    vit = toy.toy_vit().eval()
    before, kinds = vit.state_dict(), [type(module) for module in vit.modules()]
    output = vit(images())
    trained(inject(vit))
    after = vit.state_dict()
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in before.items())
    assert {name for name in after if name not in before} == {
        f"blocks.{block}.adapters.0.{layer}.{part}" for block in (0, 1) for layer in ("down", "up") for part in ("weight", "bias")
    }
    lora.inject(vit, lora.qkv_names(vit), 2)
    lora.remove(vit)
    adapters.remove(vit)
    assert list(vit.state_dict()) == list(before) and [type(module) for module in vit.modules()] == kinds
    assert torch.equal(vit(images()), output)
    assert not any(module.training for module in vit.modules())


def test_a_copy_has_adapters_of_its_own():
    vit = toy.toy_vit().eval()
    trained(inject(vit))
    expected = vit(images())
    other = lora.merged_copy(vit)
    trained(adapters.adapter_set(vit, 0), seed=1)
    adapters.activate(vit, None)
    assert torch.equal(other(images()), expected)


def test_exactly_the_adapters_get_gradients_when_only_they_train():
    vit = toy.toy_vit().requires_grad_(False)
    for adapter in trained(inject(vit)):
        adapter.requires_grad_(True)
    vit(images()).sum().backward()
    assert {name for name, p in vit.named_parameters() if p.grad is not None} == {n for n, _ in vit.named_parameters() if "adapters" in n}


def test_the_published_number_of_parameters():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        found = adapters.inject(vit, bottleneck=64)
    assert sum(p.numel() for adapter in found for p in adapter.parameters()) == 1_189_632


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bottleneck": 0}, "method.bottleneck=0 is below 1"),
        ({"dropout": 1.0}, "method.dropout=1.0 is no probability; choose 0 up to below 1"),
        ({"blocks": [2]}, r"method.blocks=\[2\] does not fit this backbone; choose distinct numbers from 0..1"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    vit = toy.toy_vit()
    with pytest.raises(ValueError, match=message):
        inject(vit, **wrong)
    assert not adapters.adapted_blocks(vit)


def test_other_kinds_of_blocks_are_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    vit = toy.vit_toy(num_classes=0, block_fn=ParallelScalingBlock)
    with pytest.raises(ValueError, match="blocks of the kind ParallelScalingBlock take no adapters"):
        inject(vit)


# ---- scales and shifts -------------------------------------------------------------------------------------------------------------


def test_scales_and_shifts_stand_behind_every_operation():
    vit = toy.toy_vit()
    found = adapters.inject_scale_shift(vit)
    layers = {name.removesuffix(".scale_shift") for name, module in vit.named_modules() if isinstance(module, adapters.ScaleShift)}
    in_a_block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert layers == {"patch_embed", "norm", *(f"blocks.{block}.{name}" for block in (0, 1) for name in in_a_block)}
    assert len(found) == len(layers)
    ones = torch.cat([shift.scale for shift in found]).detach()
    zeros = torch.cat([shift.shift for shift in found]).detach()
    assert abs(ones.mean() - 1) < 4e-3 and 0.018 < ones.std() < 0.022
    assert abs(zeros.mean()) < 4e-3 and 0.018 < zeros.std() < 0.022


def test_scales_and_shifts_are_those_of_weights():
    """Folding them into the weights of a plain model gives the same outputs; switched off, the model is what it was."""
    vit, plain = toy.toy_vit().eval(), toy.toy_vit().eval()
    before = vit(images())
    found = adapters.inject_scale_shift(vit)
    with torch.no_grad():
        for name, module in vit.named_modules():
            if isinstance(module, adapters.ScaleShift):
                module.scale.add_(torch.rand_like(module.scale))
                name = name.removesuffix(".scale_shift")
                layer: Any = plain.get_submodule(f"{name}.proj" if name == "patch_embed" else name)
                layer.weight.copy_(layer.weight * module.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
                layer.bias.copy_(layer.bias * module.scale + module.shift)
    torch.testing.assert_close(vit(images()), plain(images()), rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(vit)
    for shift in found:
        shift.is_disabled = True
    assert torch.equal(vit(images()), before)
    torch.testing.assert_close(other(images()), plain(images()), rtol=1e-4, atol=1e-4)


# ---- prompt tokens -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [True, False])
def test_prompt_tokens_take_part_in_the_attention_and_leave_again(deep):
    """A slow forward: deep, each block sees the image's tokens and its own prompts; shallow, the prompts go through all blocks."""
    vit, plain = toy.toy_vit().eval(), toy.toy_vit().eval()
    prompts = adapters.inject_prompt_tokens(vit, 3, deep=deep)
    assert [name for name, module in vit.named_modules() if isinstance(module, adapters.PromptTokens)] == [
        f"blocks.{block}.prompt" for block in range(2 if deep else 1)
    ]
    assert not any(prompt.tokens.any() for prompt in prompts), "they start at zero"
    with torch.no_grad():
        for prompt in prompts:
            prompt.tokens.normal_(generator=torch.Generator().manual_seed(0))

    x = plain._pos_embed(plain.patch_embed(images()))
    for index, block in enumerate(cast(Any, plain.blocks)):
        if deep or index == 0:
            x = torch.cat([x, prompts[index].tokens.expand(len(x), -1, -1)], dim=1)
        x = block(x)
        if deep or index == 1:
            x = x[:, :-3]
    torch.testing.assert_close(vit.forward_features(images()), plain.norm(x))
    assert (vit(images()) - plain(images())).abs().max() > 1e-3


def test_a_copy_has_prompt_tokens_of_its_own():
    vit = toy.toy_vit().eval()
    adapters.inject_prompt_tokens(vit, 3, deep=False)
    other = copy.deepcopy(vit)
    expected = vit(images())
    with torch.no_grad(), adapters.disabled(vit):
        adapters.prompt_tokens(vit)[0].tokens.fill_(9.0)
        assert torch.equal(other(images()), expected)


def test_no_prompt_tokens_are_refused():
    with pytest.raises(ValueError, match=r"method.num_tokens=0 is below 1; choose 1 or more"):
        adapters.inject_prompt_tokens(toy.toy_vit(), 0, deep=True)


@pytest.mark.parametrize("kind", ["adapter", "ssf", "vpt_deep", "vpt_shallow"])
def test_everything_can_be_switched_off(kind):
    vit = toy.toy_vit().eval()
    before = vit(images())
    if kind == "adapter":
        trained(inject(vit))
    elif kind == "ssf":
        adapters.inject_scale_shift(vit)
    else:
        adapters.inject_prompt_tokens(vit, 3, deep=kind == "vpt_deep")
    adapted = vit(images())
    assert not torch.equal(adapted, before)
    with adapters.disabled(vit):
        assert torch.equal(vit(images()), before)
    assert torch.equal(vit(images()), adapted)
