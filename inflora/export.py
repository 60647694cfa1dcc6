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
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from inflora import __version__, lora
from inflora.backbone import Backbone, tensors_sha256, timm_model
from inflora.checkpoint import CheckpointFolder, load, write_atomically
from inflora.data.transforms import Resize, build_transforms
from inflora.method import Method
from inflora.run import USER_ERRORS, build_method, make_fabric
from inflora.run_folder import finished_run, last_run_event, load_trained
from inflora.terminal import tolerate_any_encoding

TOLERANCE = 1e-4
"""Largest difference to the method's scores, relative to the largest of them: rounding in float32."""

PROVENANCE = (
    "method", "dataset", "backbone", "backbone_tag", "seed", "num_tasks", "class_order", "transform", "normalize", "weights_sha256",
    "last_accuracy", "git_commit", "module",
)  # fmt: skip
"""What `config.json` says of the run, and the `module` that makes timm know the architecture, where it is somebody else's."""


def export_run(folder: Path, out: Path, *, onnx: bool = False, peft: bool = False) -> nn.Module:
    """Write the final model of a finished run in files that need nothing of this project.

    Args:
        folder: the run folder. Neither its images nor the pretrained weights need to be there still.
        out: where to write; made if missing. What an earlier export wrote there is replaced.
        onnx: also `model.onnx`, for any number of images.
        peft: also `adapter/`, a LoRA adapter for the pretrained model, with the head.

    Returns:
        The exported model, (B, 3, S, S) -> (B, classes), classes in learning order.

    Raises:
        ValueError: if the folder holds no finished run, the method's answers are not those of one vision transformer, what training changed
            is no LoRA adapter, or a package is missing.
    """
    found, plain = finished_run(folder)
    if onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ValueError("--onnx needs packages that are not installed; run `pip install onnx onnxscript`")
    if onnx and torch.__version__ < (2, 8):  # type: ignore[operator]  # older ones do not leave the first axis free
        raise ValueError(f"--onnx needs torch 2.8 or newer, and this is {torch.__version__}; install that, or leave --onnx out")
    fabric = make_fabric(plain["trainer"] | {"num_devices": 1, "device": "cpu", "precision": "32"})
    backbone, method = build_method(fabric, plain)
    load_trained(method, folder)
    model, recipe = plain_model(method.eval(), backbone, found["method"])
    adapter = make_adapter(load(CheckpointFolder(folder / "checkpoints").base)["method"]["tensors"], model, found) if peft else None
    normalization = (backbone.mean, backbone.std) if found["normalize"] == "timm" else (None, None)
    _, transform = build_transforms(found["transform"], backbone.image_size, *normalization)
    announced = last_run_event(folder)
    assert announced is not None, "a finished run has begun"
    class_names = [name for task in announced["tasks"] for name in task]
    module = plain["backbone"]["name"].rpartition(":")[0] or None
    config = recipe | model_config(model, transform, class_names, found | {"module": module})

    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.onnx", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (out / name).unlink(missing_ok=True)  # first, so that a stopped export leaves no mixture
    _save(out / "model.safetensors", model.state_dict())
    if onnx:
        save_onnx(out / "model.onnx", model, backbone.image_size)
    if adapter is not None:
        (out / "adapter").mkdir(exist_ok=True)
        _save(out / "adapter" / "adapter_model.safetensors", adapter[1])
        _save_json(out / "adapter" / "adapter_config.json", adapter[0])
    _save_json(out / "config.json", config)
    return model


def plain_model(method: Method, backbone: Backbone, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The method as one timm model with a linear head, and what builds that model.

    Raises:
        ValueError: if that model does not give the method's scores.
    """
    refusal = ValueError(
        f"method={name} does not answer with one of timm's vision transformers and a linear head (but with prompts, adapters, prototypes, "
        "several passes or another norm), so there is no timm model of it; `python -m inflora.evaluate RUN_DIR` tests it as it is"
    )
    heads = [head for head in getattr(method.heads, "heads", []) if isinstance(head, nn.Linear)]
    if not heads:
        raise refusal
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
    if wanted.shape != given.shape or not (wanted - given).abs().max() <= TOLERANCE * given.abs().max():  # nor are NaN and infinity
        raise refusal
    return model, recipe


def model_config(model: Any, transform: Any, class_names: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """The rest of `config.json`, in the layout of timm's models on the Hugging Face hub; what is of this project is under `inflora`."""
    assert isinstance(transform, Resize)
    return {
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": class_names,
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


def save_onnx(file: Path, model: nn.Module, image_size: int) -> None:
    """Write an ONNX file whose first axis is free.

    Raises:
        ValueError: if torch cannot express the model.
    """
    batch = torch.export.Dim("batch")
    options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": ({0: batch},), "external_data": False, "verbose": False}
    try:
        write_atomically(file, lambda path: torch.onnx.export(model, (_noise(image_size),), path, **options))
    except RuntimeError as error:
        raise ValueError(f"--onnx: torch cannot export this model: {error}") from error


def make_adapter(pretrained: dict[str, Tensor], model: Any, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What training added to the pretrained weights as a LoRA adapter in PEFT's layout, the head beside it.

    The factors of all tasks together: singular vectors of the difference of each linear layer, as many as stand out of float32's rounding.

    Args:
        pretrained: the backbone's weights before the first task, by name of the method's tensors.
        model: the exported model.
        found: the run's summary.

    Returns:
        The content of `adapter_config.json`, and the tensors.

    Raises:
        ValueError: if the pretrained weights are nobody else's, anything but weights of linear layers differs, or nothing does.
    """
    base = {key: pretrained[f"backbone.{key}"] for key in model.state_dict() if not key.startswith("head.")}
    if found["weights"]["source"] == "random":
        raise ValueError("--peft: the run began with random weights, which nobody else has; export without --peft")
    if tensors_sha256(base) != found["weights"]["tensors_sha256"]:
        raise ValueError("--peft: the method began by changing the pretrained weights, which an adapter cannot say; export without --peft")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key, before in base.items():
        after = model.state_dict()[key]
        if torch.equal(before, after):
            continue
        if key not in linears:
            raise ValueError(f"--peft: training changed {key}, which is no weight of a linear layer; export without --peft")
        U, S, Vh = torch.linalg.svd(after.double() - before.double(), full_matrices=False)
        rounding = 4 * torch.finfo(torch.float32).eps * before.double().norm()
        if rank := int((rounding < S).sum()):
            roots = S[:rank].sqrt()
            factors[linears[key]] = ((roots * U[:, :rank]).float(), (roots[:, None] * Vh[:rank]).float())
    if not factors:
        raise ValueError("--peft: training changed nothing in the backbone; export without --peft, the head is in model.safetensors")
    tensors = {f"base_model.model.head.{kind}": getattr(model.head, kind) for kind in ("weight", "bias")}
    for name, (lora_B, lora_A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    ranks = {name: len(lora_A) for name, (_, lora_A) in factors.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": found["backbone_tag"] if found["weights"]["source"] == "timm" else found["weights"]["file"],
        "inference_mode": True,
        "target_modules": list(factors),
        "modules_to_save": ["head"],
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha / rank = 1
        "bias": "none",
    }
    return config, tensors


def _crop_share(size: int, resized: int) -> float:
    """size / resized, such that timm, which divides by it and rounds down, finds `resized` again."""
    share = size / resized
    return share if int(size / share) == resized else math.nextafter(share, 0)


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _save_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"))


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
    tolerate_any_encoding()
    try:
        export_run(given.run, given.out, onnx=given.onnx, peft=given.peft)
    except USER_ERRORS as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    module = json.loads((given.out / "config.json").read_text(encoding="utf-8"))["inflora"]["module"]
    after = f" after `import {module}`" if module else ""
    print(f'Written to {given.out}. In timm{after}: timm.create_model("local-dir:{given.out}", pretrained=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
