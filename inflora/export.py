"""Take the model of a finished run out of the project: `python -m inflora.export RUN_DIR --out DIR`.

Writes what plain timm loads, without this package: `model.safetensors` and `config.json`, with class names and preprocessing.

    timm.create_model("local-dir:DIR", pretrained=True)

Besides that, by choice, an ONNX file (`--onnx`) and the difference to the pretrained weights as a LoRA adapter for PEFT (`--peft`). A
method can be exported if its answers are those of one vision transformer with a linear head. That is not decided by its name: the exported
model has to give the method's scores.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn

from inflora import __version__, lora
from inflora.backbone import Backbone, timm_model
from inflora.checkpoint import CheckpointFolder, load, write_atomically
from inflora.classifier import ClassCounts
from inflora.data.transforms import Resize, build_transforms
from inflora.method import Method
from inflora.results import read_summary
from inflora.run import USER_ERRORS, build_method, make_fabric

TOLERANCE = 1e-4
"""Largest difference to the method's scores, relative to the largest of them: rounding in float32."""

PROVENANCE = (
    "method", "dataset", "backbone", "backbone_tag", "seed", "num_tasks", "class_order", "transform", "normalize", "weights_sha256",
    "last_accuracy", "git_commit",
)  # fmt: skip
"""What `config.json` says of the run."""


def export_run(folder: Path, out: Path, *, onnx: bool = False, peft: bool = False) -> nn.Module:
    """Write the final model of a finished run in files that need nothing of this project.

    Args:
        folder: the run folder. Neither its images nor the pretrained weights need to be there still.
        out: where to write; made if missing. Files of the same names are replaced.
        onnx: also `model.onnx`, for images of any number, opset chosen by torch.
        peft: also `adapter/`, a LoRA adapter for the pretrained timm model with a new head.

    Returns:
        The exported model, (B, 3, S, S) -> (B, classes), classes in learning order.

    Raises:
        ValueError: if the folder holds no finished run, the method's answers are not those of one vision transformer, what it changed is no
            LoRA adapter, or a package is missing.
    """
    found = read_summary(folder)
    if found is None:
        raise ValueError(f"{folder} holds no finished run (no summary.json); finish it with `python train.py output_dir={folder} ...`")
    if "class_names" not in found:
        raise ValueError(f"{folder} is of an older version, which did not record the names of the classes; run it again")
    if onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ValueError("--onnx needs packages that are not installed; run `pip install onnx onnxscript`")
    plain = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    plain["backbone"] |= {"pretrained": False, "checkpoint": None}  # the checkpoint has all weights
    fabric = make_fabric(plain["trainer"] | {"num_devices": 1, "device": "cpu", "precision": "32"})
    backbone, method = build_method(fabric, plain)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    state = checkpoints.latest()
    if state is None:
        raise ValueError(f"{folder} has no checkpoint left to export")
    method.load_state_dict(state["method"])
    model, recipe = plain_model(method.eval(), backbone, found["method"])

    out.mkdir(parents=True, exist_ok=True)
    normalization = (backbone.mean, backbone.std) if found["normalize"] == "timm" else (None, None)
    _, transform = build_transforms(found["transform"], backbone.image_size, *normalization)
    config = recipe | model_config(model, transform, found)
    write_atomically(out / "config.json", lambda file: file.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n"))
    _save(out / "model.safetensors", model.state_dict())
    if onnx:
        batch = torch.export.Dim("batch")
        x = _noise(backbone.image_size)
        torch.onnx.export(model, (x,), out / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False)
    if peft:
        save_adapter(out / "adapter", load(checkpoints.base)["method"]["tensors"], model, backbone.tag)
    return model


def plain_model(method: Method, backbone: Backbone, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The method as one timm model with a linear head, and what builds that model.

    Raises:
        ValueError: if that model does not give the method's scores.
    """
    refusal = ValueError(
        f"method={name} does not answer with one vision transformer and a linear head (but with prompts, adapters, prototypes or several "
        "passes), so there is no timm model of it; `python -m inflora.evaluate RUN_DIR` tests it as it is"
    )
    if isinstance(method.heads, ClassCounts):
        raise refusal
    heads = [head for head in method.heads.heads if isinstance(head, nn.Linear)]
    state = lora.merged_copy(method.backbone).state_dict()
    state["head.weight"] = torch.cat([head.weight.detach() for head in heads])
    biases = [torch.zeros(head.out_features) if head.bias is None else head.bias.detach() for head in heads]
    state["head.bias"] = torch.cat(biases)
    model, recipe = timm_model(backbone.tag, backbone.image_size, len(state["head.bias"]))
    if state.keys() != model.state_dict().keys():
        raise refusal
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    x = _noise(backbone.image_size)
    with torch.no_grad():
        wanted, given = method.predict(x), model(x)
    if wanted.shape != given.shape or (wanted - given).abs().max() > TOLERANCE * wanted.abs().max():
        raise refusal
    return model, recipe


def model_config(model: Any, transform: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The rest of `config.json`, in the layout of timm's models on the Hugging Face hub; what is of this project is under `inflora`."""
    assert isinstance(transform, Resize)
    return {
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": found["class_names"],
        "pretrained_cfg": {
            "tag": f"{found['method']}_{found['dataset']}",
            "input_size": [3, transform.size, transform.size],
            "fixed_input_size": True,
            "interpolation": transform.interpolation,
            "crop_pct": _crop_share(transform.size, transform.resized),
            "crop_mode": "center" if transform.keep_ratio else "squash",
            "mean": list(transform.mean or (0.0, 0.0, 0.0)),
            "std": list(transform.std or (1.0, 1.0, 1.0)),
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "inflora": {"version": __version__} | {key: found[key] for key in PROVENANCE},
    }


def save_adapter(out: Path, pretrained: dict[str, Tensor], model: Any, tag: str) -> None:
    """Write what training added to the pretrained weights as a LoRA adapter in PEFT's layout, the head beside it.

    The factors of all tasks together: singular vectors of the difference of each linear layer, as many as stand out of float32's rounding.

    Args:
        pretrained: the backbone's weights before the first task, by name of the method's tensors.
        model: the exported model.
        tag: timm's name of the pretrained model.

    Raises:
        ValueError: if anything but weights of linear layers differs, or nothing does.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key, value in model.state_dict().items():
        if key.startswith("head."):
            continue
        before = pretrained[f"backbone.{key}"]
        if torch.equal(before, value):
            continue
        if key not in linears:
            raise ValueError(f"--peft: training changed {key}, which is no weight of a linear layer; export without --peft")
        U, S, Vh = torch.linalg.svd(value.double() - before.double(), full_matrices=False)
        rounding = 4 * torch.finfo(torch.float32).eps * before.double().norm()
        rank = int((rounding < S).sum())
        factors[linears[key]] = ((S[:rank].sqrt() * U[:, :rank]).float(), (S[:rank].sqrt()[:, None] * Vh[:rank]).float())
    if not factors:
        raise ValueError("--peft: training changed nothing in the backbone; export without --peft, the head is in model.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.head.{kind}": getattr(model.head, kind) for kind in ("weight", "bias")}
    for name, (lora_B, lora_A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    ranks = {name: len(lora_A) for name, (_, lora_A) in factors.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": tag,
        "inference_mode": True,
        "target_modules": list(factors),
        "modules_to_save": ["head"],
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha / rank = 1
        "bias": "none",
    }
    write_atomically(out / "adapter_config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))
    _save(out / "adapter_model.safetensors", tensors)


def _crop_share(size: int, resized: int) -> float:
    """size / resized, such that timm, which divides by it and rounds down, finds `resized` again."""
    share = size / resized
    return share if int(size / share) == resized else math.nextafter(share, 0)


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_atomically(file, lambda path: path.write_bytes(content))


def _noise(image_size: int) -> Tensor:
    """(8, 3, S, S): inputs on which two models that are not the same do not agree by chance."""
    return torch.randn(8, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m inflora.export",
        description="Write the model of a finished run as a plain timm model (model.safetensors and config.json), to be used without this "
        'package: timm.create_model("local-dir:DIR", pretrained=True). `python -m inflora.predict DIR image...` classifies files with it.',
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where to write")
    parser.add_argument("--onnx", action="store_true", help="also DIR/model.onnx (pip install onnx onnxscript)")
    parser.add_argument("--peft", action="store_true", help="also DIR/adapter, a LoRA adapter for PEFT on the pretrained timm model")
    given = parser.parse_args(arguments)
    try:
        export_run(given.run, given.out, onnx=given.onnx, peft=given.peft)
    except USER_ERRORS as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    print(f'Written to {given.out}. In timm: timm.create_model("local-dir:{given.out}", pretrained=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
