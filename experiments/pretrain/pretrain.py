"""Supervised pretraining of `vit_micro`, the small ViT whose weights ship in the package.

    python experiments/pretrain/pretrain.py train  --data tinyimagenet32.npz --out runs/vit_micro --minutes 75
    python experiments/pretrain/pretrain.py export --data tinyimagenet32.npz --run runs/vit_micro --to inflora/weights/vit_micro.safetensors

`train` continues from `OUT/checkpoint.pt` when there is one. Its schedule follows a budget of optimizer steps (`--epochs`), of minutes
(`--minutes`), or of both: progress is the larger of the two fractions, so that the learning rate reaches zero even on a busy machine.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

log = logging.getLogger("pretrain")

ARCHITECTURE = "vit_tiny_patch16_224"
GEOMETRY = {"img_size": 32, "patch_size": 4, "depth": 6}
MAX_EXPORT_BYTES = 8_000_000


@dataclass(frozen=True)
class Images:
    """Decoded images, kept whole in memory: `pixels` (N, 3, 32, 32) uint8 and `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A training and a validation set over the same `classes`."""

    train: Images
    val: Images
    classes: list[str]


# --- data -----------------------------------------------------------------------------------------------------------------------------


def decode(source: Path | io.BytesIO) -> np.ndarray:
    """Decode one image to (3, S, S) uint8, resizing when its size differs from the model's."""
    size = GEOMETRY["img_size"]
    with Image.open(source) as image:
        rgb = image.convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb).transpose(2, 0, 1)


def decode_all(sources: list, labels: list[int] | np.ndarray) -> Images:
    """Decode once, with threads (PIL releases the interpreter lock while it decodes)."""
    size = GEOMETRY["img_size"]
    pixels = np.empty((len(sources), 3, size, size), np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(decode, sources, chunksize=256)):
            pixels[i] = image
    return Images(torch.from_numpy(pixels), torch.as_tensor(np.asarray(labels), dtype=torch.int64))


def load_npz(path: Path) -> Dataset:
    """Read the packed format: encoded images one after the other, `num_train` training images first."""
    with np.load(path) as archive:
        data, offsets, labels = archive["data"].tobytes(), archive["offsets"].tolist(), archive["labels"]
        num_train, classes = int(archive["num_train"]), [str(name) for name in archive["classes"]]
    files = [io.BytesIO(data[start:end]) for start, end in zip(offsets, offsets[1:], strict=False)]
    return Dataset(decode_all(files[:num_train], labels[:num_train]), decode_all(files[num_train:], labels[num_train:]), classes)


def load_folder(root: Path) -> Dataset:
    """Read `root/train/<class>/*` and `root/val/<class>/*`; the sorted training folders give the class order."""
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())

    def read(split: str) -> Images:
        files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / split / name).iterdir())]
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
    raise FileNotFoundError(f"--data={path} is neither a packed .npz file nor a folder with train/<class>/* and val/<class>/*; give one of them.")


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def augment(pixels: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random shift of up to `pad` pixels with reflected borders, and a horizontal flip for half of the images. (B, 3, S, S) uint8."""
    batch, _, size, _ = pixels.shape
    shift = torch.randint(-pad, pad + 1, (2, batch, 1), generator=generator)
    rows, cols = (torch.arange(size) + shift).unbind(0)
    flipped = torch.rand(batch, 1, generator=generator) < 0.5
    cols = torch.where(flipped, cols.flip(1), cols)

    def reflect(index: Tensor) -> Tensor:
        index = index.abs()
        return torch.where(index >= size, 2 * (size - 1) - index, index)

    rows, cols = reflect(rows), reflect(cols)
    # Indexing with (B, S, S) index tensors around the channel slice puts channels last.
    picked = pixels[torch.arange(batch)[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return picked.permute(0, 3, 1, 2)


# --- model and schedule ---------------------------------------------------------------------------------------------------------------


def build_model(num_classes: int) -> nn.Module:
    """`vit_micro` from random weights; `patch_drop_rate` only makes timm create the layer, whose rate `train` sets."""
    return timm.create_model(ARCHITECTURE, num_classes=num_classes, patch_drop_rate=0.5, **GEOMETRY)


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero; `progress` and `warmup` are fractions of the budget."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


def ema_update(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's, faster during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)


@torch.no_grad()
def accuracy_percent(model: nn.Module, images: Images, bf16: bool = False, batch_size: int = 500) -> float:
    """Top-1 accuracy in percent, without augmentation."""
    model.eval()
    correct = 0
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            correct += (model(normalize(pixels)).argmax(1) == labels).sum().item()
    return 100.0 * correct / len(images.labels)


# --- training -------------------------------------------------------------------------------------------------------------------------


class Run:
    """Everything a checkpoint holds: weights, their average, optimizer, random state, position and elapsed time."""

    def __init__(self, args: argparse.Namespace, num_classes: int) -> None:
        torch.manual_seed(args.seed)
        self.model = build_model(num_classes)
        self.average = copy.deepcopy(self.model)
        self.optimizer = create_optimizer_v2(self.model, opt=args.optimizer, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.98))
        self.step = 0
        self.elapsed_s = 0.0

    def save(self, path: Path) -> None:
        """Write atomically: a kill leaves the previous checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue exactly where `save` stopped."""
        state = torch.load(path, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]


def progress(args: argparse.Namespace, step: int, steps_per_epoch: int, elapsed_s: float) -> float:
    """Fraction of the budget used: the larger one of the step and the time fractions."""
    steps = step / (args.epochs * steps_per_epoch) if args.epochs else 0.0
    minutes = elapsed_s / (60.0 * args.minutes) if args.minutes else 0.0
    return max(steps, minutes)


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent, writing checkpoint.pt, metrics.jsonl and args.json under `args.out`."""
    if not args.epochs and not args.minutes:
        raise ValueError("train needs a budget, but neither --epochs nor --minutes is above 0; give at least one of them.")
    args.out.mkdir(parents=True, exist_ok=True)
    data = load(args.data)
    train_set, val_subset = data.train, Images(data.val.pixels[:: args.val_stride], data.val.labels[:: args.val_stride])
    steps_per_epoch = len(train_set.labels) // args.batch_size
    run, checkpoint = Run(args, len(data.classes)), args.out / "checkpoint.pt"
    if checkpoint.exists():
        run.restore(checkpoint)
    (args.out / "args.json").write_text(json.dumps(vars(args), default=str, indent=2))
    log.info("%d training and %d validation images, %d classes, %d steps an epoch; starting at step %d, %.0f s",
             len(train_set.labels), len(data.val.labels), len(data.classes), steps_per_epoch, run.step, run.elapsed_s)  # fmt: skip

    forward = torch.compile(run.model) if args.compile else run.model
    started = time.monotonic() - run.elapsed_s
    last_save, losses, window_start, window_step = run.elapsed_s, [], run.elapsed_s, run.step
    order: Tensor = torch.empty(0)
    order_epoch = -1

    def report(final: bool) -> None:
        nonlocal losses, window_start, window_step
        images = data.val if final else val_subset
        row = {
            "step": run.step,
            "epoch": round(run.step / steps_per_epoch, 3),
            "elapsed_s": round(run.elapsed_s, 1),
            "lr": run.optimizer.param_groups[0]["lr"],
            "patch_drop": run.model.patch_drop.prob,
            "train_loss": sum(losses) / max(1, len(losses)),
            "images_per_s": round((run.step - window_step) * args.batch_size / max(1e-9, run.elapsed_s - window_start), 1),
            "val_images": len(images.labels),
            "val_accuracy_percent": accuracy_percent(run.model, images, args.bf16),
            "val_accuracy_average_percent": accuracy_percent(run.average, images, args.bf16),
            "final": final,
        }
        with (args.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        log.info("%s", json.dumps(row))
        run.elapsed_s = time.monotonic() - started
        losses, window_start, window_step = [], run.elapsed_s, run.step

    while (done := progress(args, run.step, steps_per_epoch, run.elapsed_s)) < 1.0:
        epoch, position = divmod(run.step, steps_per_epoch)
        if epoch != order_epoch:
            order = torch.randperm(len(train_set.labels), generator=torch.Generator().manual_seed(args.seed * 100_003 + epoch))
            order_epoch = epoch
        chosen = order[position * args.batch_size : (position + 1) * args.batch_size]
        noise = torch.Generator().manual_seed(args.seed * 100_003 + 50_000 + run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(done, args.warmup)
        run.model.patch_drop.prob = args.patch_drop if done < args.patch_drop_until else 0.0
        run.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = forward(normalize(augment(train_set.pixels[chosen], noise)))
        loss = F.cross_entropy(logits.float(), train_set.labels[chosen], label_smoothing=args.label_smoothing)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {run.step}; lower --lr={args.lr} and start again.")
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
        ema_update(run.average, run.model, run.step, args.ema_decay)
        losses.append(loss.item())
        run.step += 1
        run.elapsed_s = time.monotonic() - started
        if run.step % args.log_steps == 0:
            log.info("step %d, %.0f s, loss %.3f", run.step, run.elapsed_s, sum(losses[-args.log_steps :]) / args.log_steps)
        if run.step % steps_per_epoch == 0:
            report(final=False)
        if run.elapsed_s - last_save > 60.0 * args.save_minutes:
            run.save(checkpoint)
            last_save = run.elapsed_s
        if args.stop_after_steps and run.step >= args.stop_after_steps:
            break
    else:
        report(final=True)
    run.save(checkpoint)


# --- export ---------------------------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    raise NotImplementedError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    t = commands.add_parser("train", help="pretrain, or continue a stopped run")
    t.add_argument("--data", type=Path, required=True, help="packed .npz, or a folder with train/<class>/* and val/<class>/*")
    t.add_argument("--out", type=Path, required=True, help="run folder; holds the checkpoint to continue from")
    t.add_argument("--epochs", type=int, default=0, help="budget in epochs; 0: none")
    t.add_argument("--minutes", type=float, default=0.0, help="budget in minutes of training, kept across restarts; 0: none")
    t.add_argument("--batch-size", type=int, default=256)
    t.add_argument("--optimizer", default="nmuon", help="a timm optimizer name")
    t.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    t.add_argument("--weight-decay", type=float, default=0.05)
    t.add_argument("--warmup", type=float, default=0.04, help="fraction of the budget")
    t.add_argument("--label-smoothing", type=float, default=0.1)
    t.add_argument("--patch-drop", type=float, default=0.5, help="fraction of the patches left out while progress < --patch-drop-until")
    t.add_argument("--patch-drop-until", type=float, default=0.65)
    t.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    t.add_argument("--ema-decay", type=float, default=0.995)
    t.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    t.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--val-stride", type=int, default=5, help="validate every epoch on every n-th image; the last validation uses all")
    t.add_argument("--log-steps", type=int, default=50)
    t.add_argument("--save-minutes", type=float, default=3.0)
    t.add_argument("--stop-after-steps", type=int, default=0, help="stop early, as an interruption would, keeping the schedule; 0: never")
    t.set_defaults(run_command=train)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse(argv)
    args.run_command(args)


if __name__ == "__main__":
    main()
