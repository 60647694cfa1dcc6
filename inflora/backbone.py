"""Builds the pretrained vision transformer from an exact timm `architecture.tag`. The only file that imports timm.

`vit_micro`, the small backbone shipped with the package, is registered with timm here and is built like any other. Somebody else's model is
registered by a module, which its name begins with: `my_package.backbone:my_vit.tag`.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from inflora.checkpoint import sha256_file
from inflora.data.download import check_reachable

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "vit_micro.safetensors"

OWN_TAGS = ("vit_micro.tiny_imagenet", "vit_base_patch16_224_ibot.in1k")

# What makes timm's ViT-B/16 one of the architectures registered here.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_micro": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3},
    "vit_base_patch16_224_ibot": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}

default_cfgs = generate_default_cfgs(
    {
        "vit_micro.tiny_imagenet": {
            "file": str(SHIPPED_WEIGHTS),
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "num_classes": 0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        # The authors' file has to be fetched by hand; the entry gives its weights a name of their own in the records.
        "vit_base_patch16_224_ibot.in1k": {
            "input_size": (3, 224, 224),
            "num_classes": 0,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32 x 32 images: patch 4, width 192, depth 6, 3 heads, 2.7 M parameters."""
    return _build("vit_micro", pretrained, **kwargs)


@register_model
def vit_base_patch16_224_ibot(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 for the weights of iBOT (Zhou et al. 2022), which timm does not have."""
    return _build("vit_base_patch16_224_ibot", pretrained, **kwargs)


def _build(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    arguments = _ARGUMENTS[name] | kwargs
    return build_model_with_cfg(VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)


class ClassTokenViT(VisionTransformer):
    """timm's ViT, whose `forward` leaves out most of what the last block computes for other tokens than the class token.

    Of those, only keys and values are read; their attention, projection and MLP would be thrown away. A training step of `vit_micro` is
    1.17 times as fast (float32, one CPU thread; bf16: 1.11 times), with the same result to rounding.

    `forward_features` stays whole, and so does a last block that has hooks or another `forward`, or is no longer timm's. Hooks inside it
    (on its MLP, say) and on the final norm see the class token only.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B, 3, H, W) -> (B, embed_dim)."""
        *blocks, last = self.blocks
        if args or options or self.global_pool != "token" or _hooks(self.blocks) or not _is_stock(last):
            return super().forward(x, *args, **options)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if blocks and self.grad_checkpointing:
            x = checkpoint_seq(blocks, x)
        else:
            for block in blocks:
                x = block(x)
        return self.forward_head(self.norm(_class_token(last, x)))


def _is_stock(block: nn.Module) -> bool:
    """Whether a block is timm's own, and nothing was put on it that would miss its call."""
    if type(block) is not Block or type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        return False
    return not any(_hooks(module) or "forward" in vars(module) for module in (block, block.attn))


def _hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _class_token(block: Any, x: Tensor) -> Tensor:
    """(B, N, embed_dim) -> (B, 1, embed_dim): what `block` makes of the first token."""
    attention = block.attn
    heads = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, dim)
    query, key, value = heads.unbind(0)  # indexing one by one would fill and add three gradients as large as all of them
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    if attention.fused_attn:
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=attention.attn_drop.p if attention.training else 0.0)
    else:
        found = attention.attn_drop((query * attention.scale @ key.mT).softmax(dim=-1)) @ value
    found = found.transpose(1, 2).flatten(2)
    if hasattr(attention, "norm"):  # older versions of timm have none
        found = attention.norm(found)
    x = x[:, :1] + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(found))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@dataclass(frozen=True)
class Backbone:
    """A backbone with what the rest of the project needs to know about it.

    Attributes:
        model: the timm model without classification head; `model(x)` is the class token after the final norm.
        tag: timm's `architecture.tag`.
        image_size: height and width of its input in pixels.
        mean, std: of the inputs the weights were pretrained with, per channel, for images in [0, 1].
        weights: where the weights came from: `source`, `file`, `sha256` of that file, and `tensors_sha256` of the loaded tensors.
    """

    model: nn.Module
    tag: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: dict[str, str | None]


def build_backbone(name: str, *, pretrained: bool, checkpoint: str | None, image_size: int | None = None) -> Backbone:
    """Build the vision transformer `name` and load its weights.

    Args:
        name: timm's exact `architecture.tag`; a bare architecture means different weights in different timm versions and is refused. Before
            it, and a colon, a module may stand that makes timm know the architecture.
        pretrained: load the weights of the tag; False leaves a random initialisation, unless `checkpoint` is given.
        checkpoint: a local `.pth`, `.npz` or `.safetensors` file that replaces the download.
        image_size: input height and width in pixels; None takes the one the weights were trained with.

    Raises:
        ValueError: for an unknown or bare name, a model that is not a plain vision transformer, or weights that do not fit it.
        FileNotFoundError: if the checkpoint does not exist, or the weights cannot be downloaded.
    """
    module, _, name = name.rpartition(":")
    if module:
        _import(module, name)
    _check_name(name)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **size)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"backbone.name={name} cannot be built for images of {image_size} pixels: {error}") from error
    except TypeError:  # other models know no img_size
        model = None
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise ValueError(f"backbone.name={name} is not a vision transformer with a class token, which every method here needs")
    patch = model.patch_embed.patch_size[0]  # type: ignore[index]
    if image_size is not None and (image_size < patch or image_size % patch):
        lower = image_size // patch * patch
        choices = f"{lower} or {lower + patch}" if lower else f"{patch}"
        raise ValueError(
            f"dataset.image_size={image_size} is no whole number of the patches of {patch} pixels of backbone.name={name}; choose {choices}"
        )
    if type(model) is VisionTransformer:
        model.__class__ = ClassTokenViT
    config: Any = model.pretrained_cfg
    if checkpoint is not None:
        file = Path(checkpoint).expanduser()
        load_checkpoint(model, file)
        source = "checkpoint"
    elif pretrained:
        file = _pretrained_file(name, config)
        load_checkpoint(model, file)
        source = "package" if file == SHIPPED_WEIGHTS else "timm"
    else:
        file, source = None, "random"
    return Backbone(
        model=model,
        tag=name,
        image_size=int(model.patch_embed.img_size[0]),  # type: ignore[index]
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        weights={
            "source": source,
            "file": file.name if file else None,
            "sha256": sha256_file(file) if file else None,
            "tensors_sha256": tensors_sha256(model.state_dict()),
        },
    )


def timm_model(tag: str, image_size: int, num_classes: int) -> tuple[Any, dict[str, Any]]:
    """A backbone's architecture as timm has it, with a linear head on the class token and random weights.

    Args:
        tag: as `Backbone.tag`.
        image_size: height and width of its input in pixels.
        num_classes: outputs of the head.

    Returns:
        The model, and `architecture` and `model_args`, with which timm builds it anew.
    """
    name = tag.partition(".")[0]
    recipe: dict[str, Any] = {"architecture": name, "model_args": {"img_size": image_size}}
    if name in _ARGUMENTS:
        recipe = {"architecture": "vit_base_patch16_224", "model_args": _ARGUMENTS[name] | {"img_size": image_size}}
    return timm.create_model(recipe["architecture"], num_classes=num_classes, **recipe["model_args"]), recipe


def load_exported(folder: Path, module: str | None = None) -> tuple[nn.Module, Callable[[Any], Tensor], list[str]]:
    """A model that `inflora.export` wrote, as timm loads it, timm's preprocessing (a PIL image to (3, S, S)), and its classes' names.

    Args:
        folder: what was written.
        module: what makes timm know the architecture, where timm does not by itself. The folder names it too, but decides nothing.

    Raises:
        ValueError: if the folder holds no such model, or needs another module.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        class_names, needed = config["label_names"], config["inflora"]["module"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} holds no exported model ({error or type(error).__name__}); `python -m inflora.export RUN_DIR --out DIR` writes one"
        ) from error
    if module:
        _import(module, config["architecture"])
    if needed and needed != module:
        raise ValueError(f"the model in {folder} is built by the module {needed}; where that code is to be trusted, add --import {needed}")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {error}") from error
    return model.eval(), create_transform(**resolve_model_data_config(model)), class_names  # type: ignore[return-value]


def _import(module: str, name: str) -> None:
    """Every process of a run builds its own backbone, so each imports the module itself."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module}, the module that makes timm know {name}, cannot be imported: {error}") from error


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"backbone.name={name} is not a timm model; did you mean one of {', '.join(_near(architecture))}?")
    own = [key for key in OWN_TAGS if key.partition(".")[0] == architecture]
    tags = own or timm.list_pretrained(f"{architecture}.*")
    if not tags:
        raise ValueError(f"backbone.name={name}: timm has no weights of {architecture}; choose one of {', '.join(_near(architecture))}")
    if not tag:
        raise ValueError(f"backbone.name={name} does not say which weights; choose one of {', '.join(tags)}")
    if name not in tags:
        raise ValueError(f"backbone.name={name} is not a known tag of {architecture}; choose one of {', '.join(tags)}")


def _near(architecture: str) -> list[str]:
    """Names, with weights, that somebody who typed this architecture may have meant."""
    return timm.list_models(f"*{architecture}*", pretrained=True)[:5] or ["vit_base_patch16_224.augreg_in21k"]


def _pretrained_file(name: str, config: Mapping[str, Any]) -> Path:
    """The local file with the weights of a tag, downloaded and cached on the first use."""
    if config.get("file"):
        return Path(config["file"])
    if not config.get("hf_hub_id"):
        raise FileNotFoundError(f"timm has no downloadable weights for backbone.name={name}; set backbone.checkpoint=FILE")
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    repository, file_name = config["hf_hub_id"].rstrip("/"), "model.safetensors"
    cached = try_to_load_from_cache(repository, file_name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # The hub client retries a missing network for half a minute, with a line each; one short request finds out quietly.
        check_reachable(hf_hub_url(repository, file_name))
        return Path(hf_hub_download(repository, file_name))
    except Exception as error:  # the hub client's own errors, of a connection that breaks off, are no OSError
        raise FileNotFoundError(
            f"the weights of {name} are not on this machine and cannot be downloaded ({error}).\n"
            f"Fetch {file_name} of {repository} on the Hugging Face hub, put it anywhere on this machine, and name it:\n"
            f"backbone.checkpoint=PATH/{file_name}"
        ) from error


def load_checkpoint(model: nn.Module, file: Path) -> None:
    """Load a local weight file into a head-free vision transformer; never executes code from the file.

    Accepts timm and original ViT/DINO/iBOT layouts. A classification or projection head in the file is left out.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, or its keys or shapes do not match the model (they are named).
    """
    if not file.is_file():
        raise FileNotFoundError(f"backbone.checkpoint={file} does not exist; give a .pth, .npz or .safetensors file")
    if file.suffix == ".npz":
        try:
            model.load_pretrained(str(file))  # type: ignore[operator]
        except (KeyError, ValueError, OSError, AssertionError, RuntimeError) as error:
            raise ValueError(f"backbone.checkpoint={file} is not a ViT checkpoint in the original .npz layout: {error}") from error
        return
    content = _read(file)
    if not isinstance(content, dict):
        raise ValueError(f"backbone.checkpoint={file} holds a {type(content).__name__}, no state dict; save the model's state dict")
    state = _strip(content)
    state = checkpoint_filter_fn(state, model)  # type: ignore[arg-type]  # older key layouts, position embeddings of another image size
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist.", "fc_norm.", "pre_logits."))}
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        parts = [
            f"{label}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
            for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if keys
        ]
        raise ValueError(f"backbone.checkpoint={file} does not fit the model; {'; '.join(parts)}")
    model.load_state_dict(state)


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"backbone.checkpoint={file} cannot be read as {file.suffix or 'a weight file'}: {error}") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"backbone.checkpoint={file} holds more than tensors, and loading it could execute code; save its state dict"
        ) from error


def _strip(state: dict[str, Any]) -> dict[str, Any]:
    """Undo the wrappings public checkpoints come in: {"state_dict": ...}, {"teacher": ...}, "module.backbone.blocks..."."""
    for key in ("state_dict", "model", "teacher", "student"):
        if isinstance(state.get(key), dict):
            state = state[key]
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and not key.startswith(("head", "masked_embed"))}


def tensors_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """One hash over names, shapes and values: two models with the same hash compute the same."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_CACHED_BY_A_CORE = 5 * 2**17  # numbers between two blocks; those inside a block are up to four times as many


def batch_without_training(model: Any, device: torch.device) -> int:
    """How many images a process should pass through a vision transformer at once where nothing is kept for a backward pass.

    On a CPU, as many as the second-level caches of its cores hold activations of: 105 for `vit_micro` on two cores, 8 for ViT-B/16. In a
    run, batches of 105 take 0.8 of the time that batches of 256 take (`vit_micro`, float32 and bf16).
    """
    if device.type != "cpu":
        return 256
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return min(256, max(1, torch.get_num_threads() * _CACHED_BY_A_CORE // (tokens * model.embed_dim)))


def write_out_attention(model: nn.Module) -> None:
    """Compute attention as products and a softmax instead of torch's fused kernel; same result to rounding.

    For half precision on a CPU: the backward pass of the fused kernel takes half of a training step there. Written out, a step of
    `vit_micro` is 2.0 times as fast (2 cores, bf16, batch 64) and one of ViT-B/16 1.25 times (batch 8); in float32 there is no difference.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # torch types children and parameters only
