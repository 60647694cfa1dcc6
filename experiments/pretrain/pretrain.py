"""Supervised pretraining of `vit_micro`, the small ViT whose weights ship in the package.

    python experiments/pretrain/pretrain.py train  --data tinyimagenet32.npz --out runs/teacher --model resnet --minutes 20
    python experiments/pretrain/pretrain.py train  --data tinyimagenet32.npz --out runs/vit_micro --teacher runs/teacher --minutes 80
    python experiments/pretrain/pretrain.py export --data tinyimagenet32.npz --run runs/vit_micro --to inflora/weights/vit_micro.safetensors

`train` continues from `OUT/checkpoint.pt` when there is one. Its schedule follows a budget of epochs, of minutes, or of both: progress is
the larger of the two fractions, so that the learning rate reaches zero in time even on a machine that does other work as well.
"""

import argparse
import copy
import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, RandomApply

log = logging.getLogger("pretrain")

ARCHITECTURE = "vit_tiny_patch16_224"
GEOMETRY = {"img_size": 32, "patch_size": 4, "depth": 6}
RESNET_CHANNELS = (32, 64, 128, 256)
RECIPES = {
    "vit_micro": {"batch_size": 512, "lr": 6e-3, "weight_decay": 0.1, "label_smoothing": 0.1, "smallest_area": 0.5, "mix": 0.3},
    "resnet": {"batch_size": 256, "lr": 3e-2, "weight_decay": 0.05, "label_smoothing": 0.0, "smallest_area": 1.0, "mix": 0.0},
}
"""Where the two models are trained in different ways."""
MAX_SHIFT = 4  # pixels: an eighth of the image, the usual amount at this size
MAX_EXPORT_BYTES = 8_000_000
SEED_STRIDE = 100_000  # keeps the streams of different seeds apart


# --- devices --------------------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: if torch finds no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        raise ValueError(f"--device={name}, but torch finds no such device on this machine; choose auto or cpu.")
    return torch.device(name)


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy what the CPU drew to `device`; from pinned memory, the only kind a CUDA copy surely reads without making the CPU wait."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


# --- data -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Decoded images, kept whole in the memory of one device: `pixels` (N, 3, 32, 32) uint8 and `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        """The same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def every(self, stride: int) -> "Images":
        """Every `stride`-th image."""
        return Images(self.pixels[::stride], self.labels[::stride])


@dataclass(frozen=True)
class Dataset:
    """A training and a validation set over the same `classes`."""

    train: Images
    val: Images
    classes: list[str]


def decode(source: Path | io.BytesIO) -> np.ndarray:
    """Decode one image to (3, 32, 32) uint8, resizing when its size differs from the model's."""
    size = GEOMETRY["img_size"]
    with Image.open(source) as image:
        rgb = image.convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def decode_all(sources: Sequence[Path | io.BytesIO], labels: Sequence[int] | np.ndarray) -> Images:
    """Decode once, with threads (PIL releases the interpreter lock while it decodes)."""
    size = GEOMETRY["img_size"]
    pixels = np.empty((len(sources), 3, size, size), np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(decode, sources)):
            pixels[i] = image
    return Images(torch.from_numpy(pixels), torch.as_tensor(np.asarray(labels), dtype=torch.int64))


def load_npz(path: Path) -> Dataset:
    """Read the packed format: `data`, encoded images one after the other, cut at `offsets`; `num_train` training images come first."""
    with np.load(path) as archive:
        data, offsets, labels = archive["data"].tobytes(), archive["offsets"].tolist(), archive["labels"]
        num_train, classes = int(archive["num_train"]), [str(name) for name in archive["classes"]]
    files = [io.BytesIO(data[start:end]) for start, end in pairwise(offsets)]
    return Dataset(decode_all(files[:num_train], labels[:num_train]), decode_all(files[num_train:], labels[num_train:]), classes)


def is_image(path: Path) -> bool:
    """Whether Pillow reads files with this suffix."""
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")


def load_folder(root: Path) -> Dataset:
    """Read `root/train/<class>/*` and `root/val/<class>/*`, at any depth; the sorted training folders give the class order.

    Raises:
        FileNotFoundError: if a class has no images in one of the two.
    """
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())

    def read(split: str) -> Images:
        files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / split / name).rglob("*")) if is_image(path)]
        missing = sorted(set(range(len(classes))) - {label for _, label in files})
        if missing:
            raise FileNotFoundError(
                f"--data={root} has no images in {split}/{classes[missing[0]]}; each class needs some in train and in val."
            )
        return decode_all([path for path, _ in files], [label for _, label in files])

    return Dataset(read("train"), read("val"), classes)


def load(path: Path) -> Dataset:
    """Load a packed `.npz` or an image folder.

    Raises:
        FileNotFoundError: if `path` is neither.
    """
    if path.suffix == ".npz" and path.is_file():
        return load_npz(path)
    if (path / "train").is_dir() and (path / "val").is_dir():
        return load_folder(path)
    raise FileNotFoundError(
        f"--data={path} is neither a packed .npz file nor a folder with train/<class>/* and val/<class>/*; give one of them."
    )


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift of up to `MAX_SHIFT` pixels with reflected borders, and a horizontal flip of half of the images. (B, 3, S, S) uint8.

    `generator` is a CPU one, so that every device sees the same shifts and flips; the pixels move on their own device.
    """
    (batch, _, size, _), device = pixels.shape, pixels.device
    shift = send(torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, batch, 1), generator=generator), device)
    index = (torch.arange(size, device=device) + shift).abs()
    index = torch.where(index >= size, 2 * (size - 1) - index, index)
    rows, cols = index.unbind(0)
    flipped = send(torch.rand(batch, 1, generator=generator) < 0.5, device)
    cols = torch.where(flipped, cols.flip(1), cols)
    # The channel slice between index tensors moves channels last.
    picked = pixels[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def zoom(x: Tensor, smallest_area: float, generator: torch.Generator) -> Tensor:
    """A random part of each image, of `smallest_area` to all of it and sides up to 4:3, resized to the whole. (B, 3, S, S) float."""
    area, ratio, y, x_position = torch.rand(4, len(x), generator=generator)
    area, ratio = smallest_area + (1 - smallest_area) * area, (4 / 3) ** (2 * ratio - 1)
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, (1 - width) * (2 * x_position - 1)
    theta[:, 1, 1], theta[:, 1, 2] = height, (1 - height) * (2 * y - 1)
    grid = F.affine_grid(send(theta, x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def training_batch(images: Images, step: int, batch_size: int, seed: int, smallest_area: float = 1.0) -> tuple[Tensor, Tensor]:
    """The augmented batch of one step, a function of `seed` and `step` alone, so that a resumed run sees the same images.

    Args:
        smallest_area: of the part of an image that `zoom` takes; 1: the image as it is.

    Returns:
        float32 (B, 3, S, S) in [-1, 1] and labels (B,), on the device of `images`. Each epoch is a new permutation; its last, incomplete
        batch is left out.
    """
    epoch, position = divmod(step, len(images.labels) // batch_size)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed * SEED_STRIDE + epoch))
    chosen = send(order[position * batch_size : (position + 1) * batch_size], images.pixels.device)
    noise = torch.Generator().manual_seed(seed * SEED_STRIDE + SEED_STRIDE // 2 + step)
    x = normalize(augment(images.pixels[chosen], noise))
    if smallest_area < 1:
        x = zoom(x, smallest_area, noise)
    return x, images.labels[chosen]


# --- model and schedule ---------------------------------------------------------------------------------------------------------------


def build_model(num_classes: int, kind: str = "vit_micro") -> nn.Module:
    """A model with random weights.

    Args:
        kind: `vit_micro`; naming a `patch_drop_rate` only makes timm create the layer, `train` sets the rate at each step. Or `resnet`, its
            teacher: timm's ResNet-18 with half the channels, and the 3 x 3 stem without pooling that is usual for images this small.
    """
    if kind == "vit_micro":
        return timm.create_model(ARCHITECTURE, num_classes=num_classes, patch_drop_rate=0.5, **GEOMETRY)
    model = timm.create_model("resnet18", num_classes=num_classes, channels=RESNET_CHANNELS)
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def model_of(run: Path) -> str:
    """The kind of model that was trained in the folder `run`."""
    return json.loads((run / "args.json").read_text()).get("model", "vit_micro")


def load_teacher(run: Path, num_classes: int, device: torch.device) -> nn.Module:
    """The averaged weights of another run, for predictions only.

    Raises:
        FileNotFoundError: if there is no run in that folder.
    """
    if not (run / "checkpoint.pt").exists():
        raise FileNotFoundError(f"--teacher={run} holds no checkpoint.pt; give the --out folder of a run, such as one with --model=resnet.")
    teacher = build_model(num_classes, model_of(run))
    teacher.load_state_dict(torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["average"])
    return teacher.to(device).eval().requires_grad_(False)


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero; `progress` and `warmup` are fractions of the budget."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's; the first steps, which start from noise, count less."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):  # batch norm's, averages already
        mean.copy_(value)


@torch.no_grad()
def accuracy_percent(model: nn.Module, images: Images, bf16: bool, batch_size: int = 500) -> float:
    """Top-1 accuracy in percent, without augmentation."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            correct += (model(normalize(pixels)).argmax(1) == labels).sum()
    return 100.0 * int(correct) / len(images.labels)


# --- training -------------------------------------------------------------------------------------------------------------------------


class Run:
    """A pretraining run: what a checkpoint holds, one step of it, and the budget it follows.

    Attributes:
        device: where the model, its average and the optimizer's moments live; weights are drawn on the CPU, the same for every device.
        model, average: the trained weights and their exponential moving average, which is what gets exported.
        step: optimizer steps done.
        elapsed_s: seconds of training, start-up excluded, summed over restarts.
    """

    def __init__(self, args: argparse.Namespace, num_classes: int, steps_per_epoch: int) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.steps_per_epoch = steps_per_epoch
        self.device = choose_device(args.device)
        self.model = build_model(num_classes, args.model).to(self.device)
        self.teacher = load_teacher(args.teacher, num_classes, self.device) if args.teacher else None
        if args.bf16 and self.device.type == "cpu":  # the fused kernel's backward pass takes half of a step there
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False
        self.average = copy.deepcopy(self.model)
        self.mix = RandomApply([CutMix(num_classes=num_classes)], p=args.mix)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = create_optimizer_v2(self.model, opt=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.98))
        self.step = 0
        self.elapsed_s = 0.0

    def progress(self) -> float:
        """Fraction of the budget used: the larger one of the step and the time fractions."""
        steps = self.step / (self.args.epochs * self.steps_per_epoch) if self.args.epochs else 0.0
        minutes = self.elapsed_s / (60.0 * self.args.minutes) if self.args.minutes else 0.0
        return max(steps, minutes)

    def train_step(self, images: Images) -> Tensor:
        """One optimizer step on the batch of `self.step`; returns its loss, () on the device, without waiting for it: see `read`."""
        args, progress = self.args, self.progress()
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(progress, args.warmup)
        is_hard = progress < args.hard_until
        if args.model == "vit_micro":
            self.model.patch_drop.prob = args.patch_drop if is_hard else 0.0
        self.model.train()
        x, y = training_batch(images, self.step, args.batch_size, args.seed, args.smallest_area if is_hard else 1.0)
        if is_hard:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.manual_seed(args.seed * SEED_STRIDE + self.step)
                x, y = self.mix(x, y)  # where it mixes, y becomes (B, num_classes), the share of each class
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
            logits = self.forward(x).float()
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        if self.teacher is not None:
            divergence = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)
            loss = loss.lerp(divergence, args.distill)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.model, self.step, args.ema_decay)
        self.step += 1
        return loss.detach()

    def read(self, losses: list[Tensor]) -> list[float]:
        """The losses of the last steps as numbers. This waits for the device, hence happens where they are reported and before saving.

        Raises:
            FloatingPointError: if one is not finite.
        """
        values = torch.stack(losses).tolist() if losses else []
        for step, value in enumerate(values, self.step - len(values)):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}; lower --lr={self.args.lr} and start in a new --out folder.")
        return values

    def save(self, path: Path, losses: list[Tensor]) -> None:
        """Write atomically: a kill leaves the previous checkpoint. `losses` are those since the last line of metrics.jsonl."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": torch.tensor(self.read(losses)),
        }
        if self.device.type != "cpu":  # patch dropout draws on the device
            state[f"rng_{self.device.type}"] = torch.get_device_module(self.device).get_rng_state()
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> list[Tensor]:
        """Continue exactly where `save` stopped; on another kind of device, whose generator has no saved state, with new patch dropout.

        Returns:
            The losses that were given to `save`.
        """
        # By way of the CPU: loading then moves each tensor to the parameters, but leaves the optimizer's step counts, which it reads at
        # every step, where they have to be.
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if f"rng_{self.device.type}" in state:
            torch.get_device_module(self.device).set_rng_state(state[f"rng_{self.device.type}"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        return list(state["losses"].to(self.device))


def rewind(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that will be written again: a stopped run's after its last checkpoint, and a finished run's last."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a full disk may have left half a line
    rows = [json.loads(line) for line in lines]
    file.write_text("".join(line for line, row in zip(lines, rows, strict=True) if row["step"] <= step and not row["final"]))


def validate(run: Run, images: Images, losses: list[Tensor], final: bool) -> None:
    """Append one line to metrics.jsonl; `losses` are those since the last line, whose mean is null where there are none."""
    values = run.read(losses)
    row = {
        "step": run.step,
        "epoch": round(run.step / run.steps_per_epoch, 3),
        "elapsed_s": round(run.elapsed_s, 1),
        "lr": run.optimizer.param_groups[0]["lr"],
        "patch_drop": run.model.patch_drop.prob if run.args.model == "vit_micro" else None,
        "train_loss": sum(values) / len(values) if values else None,
        "val_images": len(images.labels),
        "val_accuracy_percent": accuracy_percent(run.model, images, run.args.bf16),
        "val_accuracy_average_percent": accuracy_percent(run.average, images, run.args.bf16),
        "final": final,
    }
    with (run.args.out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    log.info("%s", json.dumps(row))


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent, writing checkpoint.pt, metrics.jsonl and args.json under `args.out`.

    Raises:
        ValueError: without a budget, with a batch larger than the training set, in another model's folder, or if there is no such device.
        FloatingPointError: if a loss is not finite.
    """
    if not args.epochs and not args.minutes:
        raise ValueError("train needs a budget, but neither --epochs nor --minutes is above 0; give at least one of them.")
    data = load(args.data)
    num_train = len(data.train.labels)
    if args.batch_size > num_train:
        raise ValueError(f"--batch-size={args.batch_size} exceeds the {num_train} training images; choose 1..{num_train}.")
    if (args.out / "checkpoint.pt").exists() and model_of(args.out) != args.model:
        raise ValueError(f"--out={args.out} holds a run of --model={model_of(args.out)}; continue it with that, or choose another folder.")
    run, checkpoint = Run(args, len(data.classes), num_train // args.batch_size), args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "args.json").write_text(json.dumps(vars(args) | {"run_command": "train", "device": run.device.type}, default=str, indent=2))
    losses = run.restore(checkpoint) if checkpoint.exists() else []
    rewind(args.out / "metrics.jsonl", run.step)
    images, val = data.train.to(run.device), data.val.to(run.device)
    message = "%d training and %d validation images of %d classes, %d steps an epoch on %s; starting at step %d after %.0f s"
    log.info(message, num_train, len(val.labels), len(data.classes), run.steps_per_epoch, run.device.type, run.step, run.elapsed_s)

    started_s, saved_s = time.monotonic() - run.elapsed_s, run.elapsed_s
    while run.progress() < 1.0:
        losses.append(run.train_step(images))
        if run.step % args.log_steps == 0:
            recent = run.read(losses[-args.log_steps :])
            log.info("step %d, %.0f s, loss %.3f", run.step, run.elapsed_s, sum(recent) / len(recent))
        if run.step % run.steps_per_epoch == 0:
            validate(run, val.every(args.val_stride), losses, final=False)
            losses = []
        run.elapsed_s = time.monotonic() - started_s
        if run.elapsed_s - saved_s >= 60.0 * args.save_minutes:
            run.save(checkpoint, losses)
            saved_s = run.elapsed_s
    validate(run, val, losses, final=True)
    run.save(checkpoint, losses)


# --- export ---------------------------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights, without the classification head, in half precision, and print the facts for the model card.

    The accuracy is measured with the backbone read back from the written file into a new timm model; the head, which is not shipped, comes
    from the run. All on the CPU, whichever device the run used.

    Raises:
        ValueError: if the run trained another model, or if the file would exceed `MAX_EXPORT_BYTES`.
    """
    trained = model_of(args.run)
    if trained != "vit_micro":
        raise ValueError(f"--run={args.run} trained --model={trained}; the package ships vit_micro only.")
    average = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)["average"]
    head = {name: value for name, value in average.items() if name.startswith("head.")}
    backbone = {name: value.half().contiguous() for name, value in average.items() if name not in head}
    description = {"architecture": ARCHITECTURE, "arguments": GEOMETRY | {"num_classes": 0}, "mean": [0.5] * 3, "std": [0.5] * 3}
    args.to.parent.mkdir(parents=True, exist_ok=True)
    # One metadata entry: the order of several is not defined, and the same weights should give the same bytes.
    partial = args.to.with_suffix(".partial")
    save_file(backbone, partial, metadata={"timm": json.dumps(description)})
    size = partial.stat().st_size
    if size > MAX_EXPORT_BYTES:
        partial.unlink()
        raise ValueError(f"the exported file has {size} bytes, more than the {MAX_EXPORT_BYTES} the package allows; make GEOMETRY smaller.")
    partial.chmod(0o644)  # safetensors makes private files
    os.replace(partial, args.to)

    model = timm.create_model(ARCHITECTURE, num_classes=len(head["head.bias"]), **GEOMETRY)
    model.load_state_dict({name: value.float() for name, value in load_file(args.to).items()} | head, strict=True)
    val = load(args.data).val
    facts = {
        "file": args.to.name,
        "bytes": size,
        "parameters": sum(value.numel() for value in backbone.values()),
        "sha256": hashlib.sha256(args.to.read_bytes()).hexdigest(),
        "val_images": len(val.labels),
        "val_accuracy_percent": accuracy_percent(model, val, bf16=False),
    }
    print(json.dumps(facts, indent=2))


# --- command line ---------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are the recipe of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    t = commands.add_parser("train", help="pretrain, or continue a stopped run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    t.add_argument("--data", type=Path, required=True, help="packed .npz, or a folder with train/<class>/* and val/<class>/*")
    t.add_argument("--out", type=Path, required=True, help="run folder; holds the checkpoint to continue from")
    t.add_argument("--model", choices=["vit_micro", "resnet"], default="vit_micro", help="resnet: a small one, to teach vit_micro")
    t.add_argument("--teacher", type=Path, help="run folder of a trained model, whose predictions are targets beside the labels")
    t.add_argument("--distill", type=float, default=0.7, help="share of the loss that compares with the teacher, if there is one")
    t.add_argument("--epochs", type=int, default=0, help="budget in epochs; 0: none")
    t.add_argument("--minutes", type=float, default=0.0, help="budget in minutes of training, kept across restarts; 0: none")
    t.add_argument("--batch-size", type=int, default=argparse.SUPPRESS, help=f"images a step ({_recipe('batch_size')})")
    t.add_argument("--optimizer", default="nmuon", help="a timm optimizer; nmuon: Muon with Nesterov for matrices, AdamW for the rest")
    t.add_argument("--lr", type=float, default=argparse.SUPPRESS, help=f"peak learning rate ({_recipe('lr')})")
    t.add_argument("--weight-decay", type=float, default=argparse.SUPPRESS, help=f"decoupled ({_recipe('weight_decay')})")
    t.add_argument("--warmup", type=float, default=0.04, help="fraction of the budget")
    smoothing = f"probability spread over all classes ({_recipe('label_smoothing')})"
    t.add_argument("--label-smoothing", type=float, default=argparse.SUPPRESS, help=smoothing)
    t.add_argument("--hard-until", type=float, default=0.8, help="fraction of the budget with patch dropout, zoom and CutMix")
    t.add_argument("--patch-drop", type=float, default=0.5, help="fraction of vit_micro's patches left out in that part")
    area = f"of the part of an image that is zoomed to the whole; 1: no zoom ({_recipe('smallest_area')})"
    t.add_argument("--smallest-area", type=float, default=argparse.SUPPRESS, help=area)
    t.add_argument("--mix", type=float, default=argparse.SUPPRESS, help=f"probability of CutMix, for a batch ({_recipe('mix')})")
    t.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    t.add_argument("--ema-decay", type=float, default=0.99, help="of the averaged weights, per step")
    t.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, else MPS, else the CPU")
    t.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    t.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile, for a GPU; no use on a CPU")
    t.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation")
    t.add_argument("--val-stride", type=int, default=5, help="each epoch validates on every n-th image, the end on all")
    t.add_argument("--log-steps", type=int, default=50, help="steps between two log lines")
    t.add_argument("--save-minutes", type=float, default=3.0, help="minutes between two checkpoints")
    t.set_defaults(run_command=train)

    e = commands.add_parser("export", help="write the weights for the package and print the facts for the model card")
    e.add_argument("--data", type=Path, required=True, help="the data of the run, to measure the accuracy of the written file")
    e.add_argument("--run", type=Path, required=True, help="run folder")
    e.add_argument("--to", type=Path, required=True, help="safetensors file to write")
    e.set_defaults(run_command=export)
    args = parser.parse_args(argv)
    if args.run_command is train:
        args = argparse.Namespace(**RECIPES[args.model] | vars(args))
    return args


def _recipe(name: str) -> str:
    return "; ".join(f"{model}: {recipe[name]}" for model, recipe in RECIPES.items())


def main(argv: list[str] | None = None) -> None:
    """Command line entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse(argv)
    args.run_command(args)


if __name__ == "__main__":
    main()
