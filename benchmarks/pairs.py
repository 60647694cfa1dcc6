"""The comparisons: this package and the plain reference in the same state, doing the same on the same images."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from benchmarks.timing import Row, angle, compare, kept_for_backward, largest, missed_energy, relative, timed
from inflora import lora
from inflora.backbone import batch_without_training, build_backbone, write_out_attention
from inflora.data.cache import FixedImages
from inflora.data.datasets import ImageSet, Splits, digits
from inflora.data.tasks import Loading, Task, TaskSequence
from inflora.data.transforms import build_transforms
from inflora.methods.inflora import InfLoRA
from inflora.results import Records, count_numbers
from inflora.run import PRECISIONS
from inflora.schedule import cosine99
from inflora.seeding import seed_everything
from inflora.subspace import design_branch
from inflora.trackers import Tracker, Trackers
from inflora.trainer import Meter, Trainer, evaluate, trainable_groups

BACKBONES = {"vit_micro": "vit_micro.tiny_imagenet", "vit_b16": "vit_base_patch16_224.augreg_in21k"}
WIDTHS = {192: "vit_tiny_patch16_224.augreg_in21k", 384: "vit_small_patch16_224.augreg_in21k", 768: "vit_base_patch16_224.augreg_in21k"}
"""Twelve blocks each."""

SEED, LR, SCALE = 0, 5e-4, 3**-0.5
THRESHOLDS = {"threshold": 0.95, "threshold_end": 1.0}

PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices that show how fast the machine can be

Twins = tuple[InfLoRA, reference.PlainInfLoRA]
Subspaces = tuple[list[Tensor], list[reference.Memory]]
"""For every layer: lora_A, and what the memory holds."""

FirstStep = tuple[Tensor, list[Tensor]]
"""The loss, and for every layer lora_A."""

PlainFirstStep = tuple[Tensor, list[Tensor], list[Tensor]]
"""The same, and for every layer the moments it was designed from."""


@dataclass(frozen=True)
class Sizes:
    """How much work a benchmark does.

    Attributes:
        batch_size: images per training step.
        images: training images per class, and at most half as many for testing.
        tasks: tasks of two digits each, 1..5.
        epochs: of the whole run, per task.
        turns: how often each side is timed; the whole run `run_turns` times.
        learned: numbers of tasks in the table of growth with them.
        ranks: in the table of growth with the rank; elsewhere it is 10.
        widths: keys of WIDTHS, in the table of growth with the width, at `width_image_size` pixels.
    """

    batch_size: int
    images: int
    tasks: int
    epochs: int
    turns: int
    run_turns: int
    learned: tuple[int, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    width_image_size: int


class Bench:
    """Makes the rows of the table, in the state before the last task unless said otherwise.

    Tasks are learned by decree: random branches and heads, and memories updated with the second moments of real inputs.

    Args:
        backbone: timm's exact name; `pretrained`, or with random weights.
        device: "cpu" or "cuda".
        precision: "32", "bf16" or "16", of this package's side; the plain side is always float32.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        backbone: str,
        pretrained: bool,
        device: str,
        precision: str,
        rank: int = 10,
        image_size: int | None = None,
    ) -> None:
        self.sizes, self.rank = sizes, rank
        self.writes_out_attention = device == "cpu" and precision != "32"  # as a run does
        self.tolerance, self.accuracy_tolerance = (1e-4, 0.02) if precision == "32" else (3e-2, 0.1)
        self.fabric = Fabric(
            accelerator=device,
            devices=1,
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
            plugins=[LightningEnvironment()],  # where Slurm is installed, Fabric would ask for srun
        )
        torch.manual_seed(SEED)
        built = build_backbone(backbone, pretrained=pretrained, checkpoint=None, image_size=image_size)
        self.vit = built.model.to(self.fabric.device)
        splits = few_digits(2 * sizes.tasks, sizes.images)
        self.sequence = TaskSequence(
            splits,
            class_order=list(range(2 * sizes.tasks)),
            task_sizes=[2] * sizes.tasks,
            transforms=build_transforms("shift", built.image_size, built.mean, built.std),
            loading=Loading(self.fabric.device, sizes.batch_size, batch_without_training(self.vit, self.fabric.device), SEED),
        )
        self.last = self.sequence[sizes.tasks - 1]
        self.images = reference.PlainImages(
            *((part.images.fetch(torch.arange(len(part.labels)))[0], part.labels) for part in (splits.train, splits.test)),
            classes=[task.class_ids for task in self.sequence],
            size=built.image_size,
            normalization=(built.mean, built.std),
            seed=SEED,
            batch_size=sizes.batch_size,
            device=self.fabric.device,
        )
        self._learned: dict[int, Twins] = {}
        self.moments = [self._moments(self._method(), task) for task in self.sequence]

    # ---- the rows ----

    def images_row(self) -> Row:
        """A pass over the augmented images of a task, nothing else done with them."""
        return compare(
            "augmented images of one task",
            lambda: torch.cat([x for x, _ in self.last.batches("train", stream="fit")]),
            lambda: torch.cat([x for x, _ in self.images.training(self.last.index, "fit")]),
            turns=self.sizes.turns,
            measure="difference of a pixel",
            distance=lambda fast, plain: (fast - plain).abs().max().item(),
            tolerance=1e-6,
        )

    def covariance_row(self) -> Row:
        """The pass over a task's images before it is trained, augmentation included."""
        method, plain = self._twins(self.last.index)
        return compare(
            "covariance pass over one task",
            lambda: self._moments(method, self.last),
            lambda: plain.moments(self.images.training(self.last.index, "moments_before")),
            turns=self.sizes.turns,
            measure="relative difference of a covariance",
            distance=lambda fast, plain: largest(fast, plain, relative),
            tolerance=self.tolerance,
        )

    def design_row(self) -> Row:
        """Given covariances: the branches of all layers."""
        return self.subspace_row(updates=False)

    def update_row(self) -> Row:
        """Given covariances: what the memories of all layers protect next."""
        return self.subspace_row(designs=False)

    def subspace_row(self, learned: int | None = None, *, designs: bool = True, updates: bool = True) -> Row:
        """Given covariances: the branches of all layers designed, and their memories updated, or one of the two."""
        learned = self.last.index if learned is None else learned
        method, model = self._twins(learned)
        moments, threshold = self._moments_of(learned), model.thresholds[learned]

        def fast() -> Subspaces:
            memories = copy.deepcopy(list(method.memory.values()))
            found = [design_branch(C, memory, self.rank) for C, memory in zip(moments, memories, strict=True) if designs]
            if updates:
                for C, memory in zip(moments, memories, strict=True):
                    memory.update(C, threshold)
            return found, [(memory.kind, memory.basis) for memory in memories if updates]

        def plain() -> Subspaces:
            pairs = [(C.cpu(), memory) for C, memory in zip(moments, model.memories, strict=True)]
            found = [reference.design(C, memory, self.rank, SCALE) for C, memory in pairs if designs]
            return found, [reference.update(memory, C, threshold) for C, memory in pairs if updates]

        # P C P of every layer: a branch that leaves the free space misses energy, too.
        free = [reference.project(reference.project(C.cpu(), memory).mT, memory) for C, memory in zip(moments, model.memories, strict=True)]

        def distance(fast: Subspaces, plain: Subspaces) -> float:
            # No angle for branches: of many rows the last have nearly equal energies, and change places with the reference's rounding.
            missed = max(missed_energy(*layer) for layer in zip(fast[0], plain[0], free, strict=True)) if designs else 0.0
            return max(missed, largest(fast[1], plain[1], lambda a, b: angle(a[1], b[1]) if a[0] == b[0] else float("inf")))

        parts = ["branch design"] * designs + ["DualGPM update"] * updates
        return compare(
            f"{' and '.join(parts)}, all layers",
            fast,
            plain,
            turns=self.sizes.turns,
            measure=" or ".join(
                ["square root of the share of its energy that a branch misses"] * designs
                + ["largest principal angle in rad, dimensions equal"] * updates
            ),
            distance=distance,
            tolerance=1e-3,
        )

    def step_row(self, learned: int | None = None) -> Row:
        """One batch of ready tensors. Both sides train on from turn to turn, so that whole trajectories are compared."""
        method, plain = self._twins(self.last.index if learned is None else learned, is_training=True)
        fast_batches, plain_batches = (itertools.cycle(self._batches_for(method)) for _ in range(2))
        step = self._stepper(method)
        plain_optimizer = torch.optim.Adam(plain.trained(), lr=LR)
        return compare(
            "training step",
            lambda: step(*next(fast_batches)),
            lambda: reference.step(plain, plain_optimizer, *next(plain_batches)),
            turns=self.sizes.turns,
            measure="relative difference of a loss",
            distance=lambda fast, plain: relative(fast.losses()[-1], torch.tensor(plain)),
            tolerance=self.tolerance,
        )

    def first_step_row(self) -> Row:
        """A fresh model until its first step is done: the pass over the first task's images, all branches designed, one batch."""
        first, trainer = self.sequence[0], self._trainer(Path())

        def fast() -> FirstStep:
            method = self._method()
            seed_everything(SEED, "begin", 0)
            with self.fabric.autocast():
                method.begin_task(first)
            loss = self._stepper(method, trainer)(*next(iter(first.batches("train", stream="fit")))).losses()[-1]
            return loss, [branch.lora_A for branch in method.branches.values()]

        def plain() -> PlainFirstStep:
            model = self._plain(len(self.sequence))
            moments = model.moments(self.images.training(0, "moments_before"))
            seed_everything(SEED, "begin", 0)
            model.begin_task(moments, torch.nn.Linear(self.vit.num_features, 2).to(self.fabric.device))  # type: ignore[arg-type]
            batch = next(iter(self.images.training(0, "fit")))
            loss = torch.tensor(reference.step(model, torch.optim.Adam(model.trained(), lr=LR), *batch))
            return loss, [attention.lora_A[-1] for attention in model.attentions], moments

        def distance(fast: FirstStep, plain: PlainFirstStep) -> float:
            # No angle, as where both sides design from the same moments: directions of nearly equal energy change places with the
            # rounding of the inputs.
            missed = [missed_energy(*layer) for layer in zip(fast[1], *plain[1:], strict=True)]
            return max(relative(fast[0], plain[0]), *missed)

        return compare(
            "time to the first step",
            fast,
            plain,
            turns=self.sizes.turns,
            measure="relative difference of the loss, or square root of the share of its energy that a branch misses",
            distance=distance,
            tolerance=self.tolerance,
        )

    def evaluation_row(self) -> Row:
        """All test images, after the last task."""
        method, plain = self._twins(len(self.sequence))
        return compare(
            "evaluation on all tasks",
            lambda: torch.from_numpy(evaluate(method, self.sequence.tasks, self.sequence.class_to_task, self.fabric)),
            lambda: reference.evaluate(plain, self.images, len(self.sequence)),
            turns=self.sizes.turns,
            measure="difference of an accuracy",
            distance=lambda fast, plain: (fast - plain).abs().max().item(),
            tolerance=self.accuracy_tolerance,
        )

    def run_row(self) -> Row:
        """A whole sequence. This package also writes its checkpoints and measures interference, as every run of it does."""

        def fast() -> tuple[Tensor, Tensor]:
            with tempfile.TemporaryDirectory() as folder:
                losses = EpochLosses(folder=folder)
                trainer = self._trainer(Path(folder), losses)
                trainer.run(self._method(), self.sequence, {})
            return torch.tensor(losses.values), torch.from_numpy(trainer.records.matrices).nan_to_num()

        return compare(
            "whole small run",
            fast,
            lambda: reference.run(self._plain(len(self.sequence)), self.images, epochs=self.sizes.epochs, lr=LR),
            turns=self.sizes.run_turns,
            measure="difference of the losses (relative) or of an accuracy",
            distance=lambda fast, plain: max(relative(fast[0], plain[0]), (fast[1] - plain[1]).abs().max().item()),
            tolerance=self.accuracy_tolerance,
        )

    def limit(self) -> dict[str, float]:
        """How near a training step is to the machine's limit: its operations, against those of large products in the same precision.

        Operations are those of matrix products, as torch counts them with attention written out, which it cannot count in a fused kernel;
        the skinny product with `lora_B`, in place, is not among them.
        """
        method, _ = self._twins(self.last.index, is_training=True)
        x, y = self._batches_for(method)[0]
        counted = copy.deepcopy(method)
        write_out_attention(counted.backbone)
        step = self._stepper(counted)
        with FlopCounterMode(display=False) as counter:
            step(x, y)
        operations = counter.get_total_flops()
        size, device = PRODUCT_SIZE[self.fabric.device.type], self.fabric.device.type
        with self.fabric.autocast():
            kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        left, right = torch.randn(2, size, size, device=device, dtype=torch.float32).to(kind)
        step = self._stepper(method)
        product_s, step_s = [], []
        for _ in range(self.sizes.turns + 1):  # the first turn warms up
            product_s.append(timed(lambda: left @ right)[0])
            step_s.append(timed(lambda: step(x, y))[0])
        seconds, rate = median(step_s[1:]), 2 * size**3 / median(product_s[1:])
        return {
            "operations": operations,
            "step_rate": operations / seconds,
            "product_rate": rate,
            "fraction": operations / seconds / rate,
            "images_per_second": len(x) / seconds,
        }

    def growth(self, learned: int | None = None) -> dict[str, Any]:
        """What a task costs after so many others: times as rows, sizes as pairs (this package, plain)."""
        learned = self.last.index if learned is None else learned
        method, plain = self._twins(learned, is_training=True)
        x, y = self._batches_for(method)[0]
        trainable_groups(method, {"branch": LR, "head": LR})

        def fast_loss() -> Tensor:
            with self.fabric.autocast():
                return method.local_cross_entropy(method.features(x), y)

        return {
            "training step": self.step_row(learned),
            "subspaces": self.subspace_row(learned),
            "numbers stored": (count_numbers(method.state_dict()) - count_numbers(self.vit.state_dict()), plain.stored_numbers()),
            "bytes kept for backward": (
                kept_for_backward(fast_loss, method),
                kept_for_backward(lambda: plain.loss(x, y), plain.vit),
            ),
        }

    # ---- states ----

    def _method(self) -> InfLoRA:
        options = {**THRESHOLDS, "energy": "gram", "decomposition": "PC", "lora_A_scale": SCALE, "dual": True}
        vit = copy.deepcopy(self.vit)
        if self.writes_out_attention:
            write_out_attention(vit)
        return InfLoRA(vit, rank=self.rank, blocks=None, **options).eval()

    def _plain(self, num_tasks: int) -> reference.PlainInfLoRA:
        return reference.PlainInfLoRA(self.vit, rank=self.rank, scale=SCALE, num_tasks=num_tasks, **THRESHOLDS)

    def _twins(self, learned: int, *, is_training: bool = False) -> Twins:
        """Both sides after so many tasks, or (`is_training`) at the first step of the next one."""
        if learned not in self._learned:  # a hundred tasks take long where layers are wide, and several rows ask for them
            self._learned = {learned: self._learn(learned)}
        method, plain = copy.deepcopy(self._learned[learned])
        if is_training:
            pairs = zip(self._moments_of(learned), method.memory.values(), strict=True)
            self._begin(method, plain, [design_branch(C, memory, self.rank) for C, memory in pairs])
        return method, plain

    def _learn(self, learned: int) -> Twins:
        method, plain = self._method(), self._plain(max(learned + 1, len(self.sequence)))
        random = torch.Generator().manual_seed(SEED)
        for task in range(learned):
            lora_A = SCALE * torch.linalg.qr(torch.randn(self.vit.num_features, self.rank, generator=random)).Q.mT  # type: ignore[arg-type]
            self._begin(method, plain, [lora_A] * len(method.targets))
            for branch, attention in zip(lora.branches(method.backbone).values(), plain.attentions, strict=True):
                branch.lora_B.data.copy_(0.1 * torch.randn(branch.lora_B.shape, generator=random))
                attention.lora_B_k[-1].data.copy_(branch.lora_B[0])
                attention.lora_B_v[-1].data.copy_(branch.lora_B[1])
            for memory, C in zip(method.memory.values(), self._moments_of(task), strict=True):
                memory.update(C, plain.thresholds[task])
            lora.merge(method.backbone)
            lora.remove(method.backbone)
        plain.memories = [(memory.kind, memory.basis.float()) if learned else None for memory in method.memory.values()]
        return method, plain

    def _begin(self, method: InfLoRA, plain: reference.PlainInfLoRA, designs: list[Tensor]) -> None:
        head = method.heads.grow(2, self.fabric.device)
        plain.add_branch(designs, copy.deepcopy(head).requires_grad_(True))
        for branch, lora_A in zip(method.inject().values(), designs, strict=True):
            branch.set_lora_A(lora_A)

    def _moments(self, method: InfLoRA, task: Task) -> list[Tensor]:
        with self.fabric.autocast():
            return list(method.input_moments(task, "moments_before").values())

    def _moments_of(self, task: int) -> list[Tensor]:
        return self.moments[task % len(self.moments)]  # growth goes on beyond the tasks there are

    def _batches_for(self, method: InfLoRA) -> list[reference.Batch]:
        """The last task's batches, as if it came when it is the method's turn to learn it."""
        shift = method.num_old_classes - self.last.num_old_classes
        return [(x, y + shift) for x, y in self.last.batches("train", stream="fit")]

    def _stepper(self, method: InfLoRA, trainer: Trainer | None = None) -> Callable[[Tensor, Tensor], Meter]:
        """What takes one training step of the method on a batch; its meter keeps the losses."""
        trainer, meter = trainer or self._trainer(Path()), Meter(None, self.last, 0)
        optimizer = self.fabric.setup_optimizers(torch.optim.Adam(trainable_groups(method, trainer.rates)))

        def step(x: Tensor, y: Tensor) -> Meter:
            method.sample_ids = torch.arange(len(x))
            trainer._step(method, optimizer, x, y, len(x), meter)
            return meter

        return step

    def _trainer(self, folder: Path, *trackers: Tracker) -> Trainer:
        return Trainer(
            self.fabric,
            epochs=self.sizes.epochs,
            optimizer=torch.optim.Adam,
            lr=LR,
            head_lr=LR,
            schedule=partial(cosine99, lag=1),
            grad_clip=None,
            grad_accumulation=1,
            seed=SEED,
            folder=folder,
            records=Records(len(self.sequence), self.fabric.device),
            trackers=Trackers(trackers),
            show_progress=False,
        )


class EpochLosses(Tracker):
    """Keeps the mean loss of every epoch in `values`."""

    def __init__(self, *, folder: str) -> None:
        super().__init__(folder=folder)
        self.values: list[float] = []

    def log(self, event: str, values: Mapping[str, Any], step: int) -> None:
        if event == "epoch":
            self.values.append(values["loss"])


def few_digits(num_classes: int, per_class: int) -> Splits:
    """The first images of the first digits: so many of each for training, half as many for testing."""
    full = digits(Path())

    def cut(images: ImageSet, limit: int) -> ImageSet:
        rows = torch.cat([(images.labels == label).nonzero().flatten()[:limit] for label in range(num_classes)])
        return ImageSet(FixedImages(images.images.fetch(rows)[0]), images.labels[rows], [images.paths[row] for row in rows.tolist()])

    return Splits(cut(full.train, per_class), cut(full.test, per_class // 2), full.class_names[:num_classes], full.split_id)
