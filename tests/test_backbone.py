"""Backbones by exact name, and weights from files of every layout the public ones come in."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import toy
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora import backbone
from inflora.backbone import (
    SHIPPED_WEIGHTS,
    Backbone,
    ClassTokenViT,
    batch_without_training,
    build_backbone,
    load_checkpoint,
    tensors_sha256,
    write_out_attention,
)
from inflora.parts.prompts import install_prefixes, prefixes

SMALL = "test_vit.r160_in1k"
"""timm's own smallest vision transformer: 160 pixels, patches of 16, width 64."""


def random_backbone(name: str = "vit_toy.test", **changes: Any) -> Backbone:
    return build_backbone(name, **{"pretrained": False, "checkpoint": None, **changes})


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


# ---- names -------------------------------------------------------------------------------------------------------------------------


def test_a_backbone_is_a_headless_timm_model():
    found = random_backbone()
    assert (found.tag, found.image_size, found.mean, found.std) == ("vit_toy.test", 16, (0.5,) * 3, (0.5,) * 3)
    assert found.weights["source"] == "random" and found.weights["file"] is None and found.weights["sha256"] is None
    assert found.weights["tensors_sha256"] == tensors_sha256(found.model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    features = found.model(x)
    assert features.shape == (2, toy.EMBED_DIM)
    torch.testing.assert_close(features, found.model.forward_features(x)[:, 0])  # type: ignore[operator]


def test_the_image_size_may_change():
    found = random_backbone(SMALL, image_size=32)
    assert found.image_size == 32
    assert found.model(torch.randn(1, 3, 32, 32)).shape == (1, 64)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_base_patch16_224", r"does not say which weights; choose one of .*vit_base_patch16_224\.augreg_in21k"),
        ("vit_base_patch16_224.augreg_in22k", "augreg_in22k is not a known tag of vit_base_patch16_224; choose one of vit_base"),
        ("vit_toyy.test", r"backbone.name=vit_toyy.test is not a timm model; did you mean one of "),
        ("test_vit4.r160_in1k", "backbone.name=test_vit4.r160_in1k: timm has no weights of test_vit4; choose one of "),
        ("nowhere.vits:my_vit.one", "nowhere.vits, the module that makes timm know my_vit.one, cannot be imported: No module named"),
        ("test_resnet.r160_in1k", "test_resnet.r160_in1k is not a vision transformer with a class token, which every method here needs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("image_size", [None, 160])
def test_a_name_that_cannot_be_used(name, image_size, message):
    with pytest.raises(ValueError, match=message):
        random_backbone(name, image_size=image_size)


def test_an_image_size_that_does_not_fit_the_patches():
    with pytest.raises(ValueError, match=r"=2 is no whole number of the patches of 4 pixels of backbone.name=vit_toy.test; choose 4$"):
        random_backbone(image_size=2)


# ---- weights from a file -----------------------------------------------------------------------------------------------------------


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


HEAD = {"head.weight": torch.zeros(5, toy.EMBED_DIM), "head.bias": torch.zeros(5)}
PROJECTION = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_g": torch.zeros(3, 1)}

LAYOUTS = {
    "timm": lambda state: state | HEAD,
    "headless": lambda state: state,
    "training run": lambda state: {"state_dict": state | HEAD, "epoch": 3},
    "deit": lambda state: {"model": state | HEAD},
    "dino": lambda state: {"student": {}, "teacher": wrapped(state | PROJECTION, "backbone.") | wrapped(PROJECTION, "")},
    "ibot teacher": lambda state: {"state_dict": state | {"masked_embed": torch.zeros(1, toy.EMBED_DIM)}},
    "distributed": lambda state: {"teacher": wrapped(state, "module.backbone.") | {"module.head.mlp.0.weight": torch.zeros(4, 4)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_public_checkpoints(layout, tmp_path):
    state = toy.toy_vit(seed=1).state_dict()
    content = LAYOUTS[layout](state)
    if layout == "dino":
        del content["student"]
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    found = random_backbone(checkpoint=str(file))
    assert same(found.model.state_dict(), state)
    assert found.weights == {
        "source": "checkpoint",
        "file": "weights.pth",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tensors_sha256": tensors_sha256(state),
    }


def test_a_teacher_wins_over_the_student(tmp_path):
    teacher, student = toy.toy_vit(seed=1).state_dict(), toy.toy_vit(seed=2).state_dict()
    torch.save({"student": wrapped(student, "module.backbone."), "teacher": wrapped(teacher, "backbone.")}, tmp_path / "both.pth")
    assert same(random_backbone(checkpoint=str(tmp_path / "both.pth")).model.state_dict(), teacher)


def test_safetensors_and_a_home_folder(tmp_path, monkeypatch):
    state = toy.toy_vit(seed=1).state_dict()
    save_file(state | HEAD, tmp_path / "weights.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(random_backbone(checkpoint="~/weights.safetensors").model.state_dict(), state)


def test_positions_are_resized_to_the_images(tmp_path):
    state = toy.toy_vit(seed=1).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    found = random_backbone(checkpoint=str(tmp_path / "weights.safetensors"), image_size=24)
    assert found.model.pos_embed.shape == (1, 1 + 36, toy.EMBED_DIM)  # type: ignore[union-attr]
    assert torch.equal(found.model.pos_embed[:, 0], state["pos_embed"][:, 0])  # type: ignore[index]
    assert found.model(torch.randn(1, 3, 24, 24)).shape == (1, toy.EMBED_DIM)


def npz_state(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The layout of Google's original checkpoints, written from its description: kernels are (in, out), attention is split in heads."""
    d, heads = toy.EMBED_DIM, 2
    values = {key: value.numpy() for key, value in state.items()}
    found = {
        "cls": values["cls_token"],
        "embedding/kernel": values["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": values["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": values["pos_embed"],
        "Transformer/encoder_norm/scale": values["norm.weight"],
        "Transformer/encoder_norm/bias": values["norm.bias"],
        "head/kernel": np.zeros((d, 5), np.float32),
        "head/bias": np.zeros(5, np.float32),
    }
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * d, (part + 1) * d)
            found[f"{attention}{name}/kernel"] = values[ours + "attn.qkv.weight"][rows].T.reshape(d, heads, d // heads)
            found[f"{attention}{name}/bias"] = values[ours + "attn.qkv.bias"][rows].reshape(heads, d // heads)
        found[attention + "out/kernel"] = values[ours + "attn.proj.weight"].T.reshape(heads, d // heads, d)
        found[attention + "out/bias"] = values[ours + "attn.proj.bias"]
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            found[f"{theirs}{name}/scale"] = values[f"{ours}{norm}.weight"]
            found[f"{theirs}{name}/bias"] = values[f"{ours}{norm}.bias"]
        for layer in range(2):
            found[f"{theirs}MlpBlock_3/Dense_{layer}/kernel"] = values[f"{ours}mlp.fc{layer + 1}.weight"].T
            found[f"{theirs}MlpBlock_3/Dense_{layer}/bias"] = values[f"{ours}mlp.fc{layer + 1}.bias"]
    return found


def test_the_original_npz_layout(tmp_path):
    state = toy.toy_vit(seed=1).state_dict()
    np.savez(tmp_path / "weights.npz", **npz_state(state))
    assert same(random_backbone(checkpoint=str(tmp_path / "weights.npz")).model.state_dict(), state)


def test_an_incomplete_npz(tmp_path):
    content = npz_state(toy.toy_vit(seed=1).state_dict())
    del content["Transformer/encoderblock_1/LayerNorm_2/scale"]
    np.savez(tmp_path / "weights.npz", **content)
    with pytest.raises(
        ValueError, match=r"weights.npz is not a ViT checkpoint in the original .npz layout: .*encoderblock_1/LayerNorm_2/scale"
    ):
        random_backbone(checkpoint=str(tmp_path / "weights.npz"))
    (tmp_path / "weights.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"weights.npz is not a ViT checkpoint in the original .npz layout"):
        random_backbone(checkpoint=str(tmp_path / "weights.npz"))


def test_a_file_that_does_not_fit_names_its_keys(tmp_path):
    state = toy.toy_vit(seed=1).state_dict()
    del state["norm.weight"], state["blocks.0.attn.qkv.bias"]
    state |= {"blocks.7.new": torch.zeros(1), "cls_token": torch.zeros(1, 1, 7)}
    save_file(state, tmp_path / "weights.safetensors")
    vit = toy.toy_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(vit, tmp_path / "weights.safetensors")
    assert str(error.value) == (
        f"backbone.checkpoint={tmp_path / 'weights.safetensors'} does not fit the model; "
        "missing: blocks.0.attn.qkv.bias, norm.weight; unexpected: blocks.7.new; of another shape: cls_token"
    )
    assert same(vit.state_dict(), before)


def test_a_long_list_of_keys_is_shortened(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing: (\S+, ){5}\S+ \.\.\.; unexpected: x$"):
        random_backbone(checkpoint=str(tmp_path / "weights.safetensors"))


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_loading_a_file_never_executes_code(tmp_path):
    torch.save({"state_dict": {}, "args": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth holds more than tensors, and loading it could execute code; save its state dict"):
        random_backbone(checkpoint=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_a_file_that_is_no_checkpoint(name, tmp_path):
    for content in (b"", b"not weights at all", b"\x80\x02garbage" * 10):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"backbone.checkpoint=.*{name} (cannot be read as|holds more than tensors)"):
            random_backbone(checkpoint=str(tmp_path / name))


def test_a_checkpoint_that_holds_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth holds a list, no state dict; save the model's state dict"):
        random_backbone(checkpoint=str(tmp_path / "list.pth"))


def test_a_file_that_does_not_exist(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"backbone.checkpoint={path} does not exist; give a .pth, .npz or .safetensors file"):
            random_backbone(checkpoint=str(path))


# ---- weights of a name -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No network: every request fails at once, and is written down."""
    asked: list[str] = []

    def refuse(request: Any, **_: Any) -> None:
        asked.append(request.full_url)
        raise OSError("no route to host")

    import huggingface_hub

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("asked for the file after the network was found missing")
    )
    return asked


def test_weights_that_cannot_be_downloaded_are_described_in_three_lines(offline):
    with pytest.raises(FileNotFoundError) as error:
        random_backbone(SMALL, pretrained=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert SMALL in lines[0] and "no route to host" in lines[0]
    assert lines[2].startswith("backbone.checkpoint=")
    assert len(offline) == 1


def test_cached_weights_need_no_network(offline, monkeypatch, tmp_path):
    import huggingface_hub

    config = timm.models.get_pretrained_cfg(SMALL)
    state = timm.create_model(SMALL, num_classes=0).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    wanted = []
    cached = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments: wanted.append(arguments) or cached)
    found = random_backbone(SMALL, pretrained=True)
    assert same(found.model.state_dict(), state)
    assert found.weights["source"] == "timm"
    assert wanted == [(config.hf_hub_id.rstrip("/"), "model.safetensors")]  # type: ignore[union-attr]
    assert offline == []


def test_the_shipped_weights_fit(caplog):
    with caplog.at_level(logging.WARNING):
        found = build_backbone("vit_micro.tiny_imagenet", pretrained=True, checkpoint=None)
    assert (found.image_size, found.weights["source"], found.weights["file"]) == (32, "package", "vit_micro.safetensors")
    assert sum(p.numel() for p in found.model.parameters()) == pytest.approx(2.7e6, rel=0.01)
    features = found.model(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, 192) and features.isfinite().all()
    assert SHIPPED_WEIGHTS.stat().st_size < 12_000_000
    assert not caplog.records


# ---- hashes ------------------------------------------------------------------------------------------------------------------------


def test_one_hash_for_what_computes_the_same():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    known = tensors_sha256(state)
    assert tensors_sha256(dict(reversed(state.items()))) == known
    assert tensors_sha256({**state, "a": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)}) == known
    others = [
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"] + 1e-6},
        {**state, "b": torch.zeros(2, dtype=torch.int32)},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({known, *map(tensors_sha256, others)}) == 6


def test_a_module_is_hashed_through_its_state():
    assert tensors_sha256(nn.Linear(2, 2).state_dict()) != tensors_sha256(nn.Linear(2, 2).state_dict())
    assert backbone.SHIPPED_WEIGHTS.parent.parent == Path(backbone.__file__).parent


# ---- attention ---------------------------------------------------------------------------------------------------------------------


def test_batches_without_training_fit_the_cache_of_a_cpu():
    vit, gpu = toy.toy_vit(), torch.device("cuda")
    tokens_and_width = (vit.patch_embed.num_patches + 1) * 32
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert batch_without_training(vit, torch.device("cpu")) == min(256, 2 * 655360 // tokens_and_width)
        micro = build_backbone("vit_micro.tiny_imagenet", pretrained=False, checkpoint=None).model
        assert batch_without_training(micro, torch.device("cpu")) == 105
        large = build_backbone("vit_tiny_patch16_224.augreg_in21k", pretrained=False, checkpoint=None, image_size=2048).model
        assert batch_without_training(large, torch.device("cpu")) == 1
        assert batch_without_training(large, gpu) == 256
    finally:
        torch.set_num_threads(threads)


def test_attention_written_out_is_the_same_function():
    x = torch.randn(3, 3, 16, 16)
    fused, written_out = toy.toy_vit().double(), toy.toy_vit().double()
    write_out_attention(written_out)
    assert [block.attn.fused_attn for block in written_out.blocks] == [False, False]
    found = []
    for model in (fused, written_out):
        model(x.double()).square().sum().backward()
        found.append([model(x.double()), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# ---- the class token only ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_of_last_mlp(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the MLP of a last block saw, call by call."""
    seen: list[int] = []
    forward = timm.layers.Mlp.forward

    def counting(mlp: nn.Module, x: Tensor) -> Tensor:
        if getattr(mlp, "is_last", False):
            seen.append(x.shape[1])
        return forward(mlp, x)

    monkeypatch.setattr(timm.layers.Mlp, "forward", counting)
    return seen


def twins(**options: Any) -> tuple[ClassTokenViT, VisionTransformer]:
    """The same float64 model with and without the short last block."""
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0} | options
    torch.manual_seed(0)
    stock = VisionTransformer(**options).double()
    for parameter in stock.parameters():  # some start at zero, or at one
        nn.init.normal_(parameter, std=0.2)
    short = ClassTokenViT(**options).double()
    short.load_state_dict(stock.state_dict())
    for model in (short, stock):
        model.blocks[-1].mlp.is_last = True
    return short, stock


def same_features_and_gradients(short: nn.Module, stock: nn.Module) -> None:
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found = []
    for model in (short, stock):
        features = model(x)
        features.square().sum().backward()
        found.append({"features": features.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-11)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"depth": 1},
    "no bias": {"qkv_bias": False},
    "norms of queries and keys": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2},
    "norm before the blocks": {"pre_norm": True},
}


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_the_last_block_computes_the_class_token_only(options, is_checkpointed, is_fused, rows_of_last_mlp):
    short, stock = twins(**options)
    short.set_grad_checkpointing(is_checkpointed)
    if not is_fused:
        write_out_attention(short)
    same_features_and_gradients(short, stock)
    assert rows_of_last_mlp == [1, 17 + options.get("reg_tokens", 0)]


def test_other_features_than_the_class_token_stay_whole(rows_of_last_mlp):
    short, stock = twins()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(short.forward_features(x), stock.forward_features(x))
    same_features_and_gradients(*twins(global_pool="avg"))
    assert set(rows_of_last_mlp) == {17}


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("part", ["blocks", "blocks.2", "blocks.2.attn"])
def test_a_block_with_hooks_stays_whole(part, kind, rows_of_last_mlp):
    calls: list[str] = []
    pair = twins()
    for model in pair:
        getattr(model.get_submodule(part), f"register_{kind}")(lambda *_: calls.append("called"))
    same_features_and_gradients(*pair)
    assert len(calls) == 2
    assert rows_of_last_mlp == [17, 17]


@pytest.mark.parametrize("part", ["blocks.2", "blocks.2.attn"])
def test_a_block_with_a_forward_of_its_own_stays_whole(part, rows_of_last_mlp):
    calls: list[str] = []

    def patch(module: nn.Module) -> None:
        forward = module.forward

        def patched(*arguments: Any, **options: Any) -> Tensor:
            calls.append("called")
            return forward(*arguments, **options)

        module.forward = patched

    pair = twins()
    for model in pair:
        patch(model.get_submodule(part))
    same_features_and_gradients(*pair)
    assert len(calls) == 2
    assert rows_of_last_mlp == [17, 17]


def test_a_block_with_prefixes_stays_whole(rows_of_last_mlp):
    pair = twins()
    for model in pair:
        install_prefixes(model, [2])
    prefix = torch.randn(3, 2, 4, 32, dtype=torch.float64)
    with prefixes(pair[0], {2: prefix}), prefixes(pair[1], {2: prefix}):
        same_features_and_gradients(*pair)
    assert rows_of_last_mlp == [17, 17]


def test_every_backbone_of_timms_own_kind_has_the_short_last_block():
    assert type(random_backbone().model) is ClassTokenViT
    assert type(random_backbone("vit_micro.tiny_imagenet").model) is ClassTokenViT
