"""A world small enough for tests: a vision transformer with two blocks and data sets of a few 16-pixel images.

Importing this file makes timm know `vit_toy.test`; `dataset._target_=toy.tiny` makes a run use the images.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora.data.cache import FixedImages
from inflora.data.datasets import ImageSet, Splits
from inflora.data.tasks import Loading, TaskSequence, split_task_sizes
from inflora.data.transforms import build_transforms
from inflora.method import Method
from inflora.methods.linear_probe import LinearProbe
from inflora.parts.collective import sum_over_processes
from inflora.seeding import generator

IMAGE_SIZE = 16
EMBED_DIM = 32

default_cfgs = generate_default_cfgs(
    {
        "vit_toy.test": {
            "file": "there are no weights",
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "num_classes": 0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_toy(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """16 x 16 images in 16 patches, width 32, 2 blocks: 28 thousand parameters."""
    arguments: dict[str, Any] = {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": EMBED_DIM, "depth": 2, "num_heads": 2} | kwargs
    return build_model_with_cfg(VisionTransformer, "vit_toy", pretrained, **arguments)


def toy_vit(seed: int = 0) -> VisionTransformer:
    """A fresh headless `vit_toy`. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vit_toy(num_classes=0)


# ---- data --------------------------------------------------------------------------------------------------------------------------


def tiny(root: Path, *, split: str | None = None, num_classes: int = 6, train: int = 6, test: int = 4) -> Splits:
    """A data set function as `dataset._target_` names one.

    Each class is a pattern of its own plus noise. The images of a class depend on its number alone, so a data set with more classes holds
    those of a smaller one.
    """
    names = [f"class_{number:02d}" for number in range(num_classes)]

    def image_set(part: str, count: int) -> ImageSet:
        pixels = torch.cat([_images(number, part, count) for number in range(num_classes)])
        paths = [f"{part}/{name}/{row}" for name in names for row in range(count)]
        return ImageSet(FixedImages(pixels), torch.arange(num_classes).repeat_interleave(count), paths)

    return Splits(image_set("train", train), image_set("test", test), names, "toy")


def growing(root: Path, *, split: str | None = None) -> Splits:
    """`tiny` with as many classes as the file `num_classes` in `root` says: images may be added between two runs."""
    return tiny(root, split=split, num_classes=int((root / "num_classes").read_text()))


def _images(number: int, part: str, count: int) -> Tensor:
    pattern = torch.rand(3, 4, 4, generator=generator(0, "pattern", number)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    noise = torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(0, part, number))
    return (255 * (0.7 * pattern + 0.3 * noise)).to(torch.uint8)


def sequence(
    num_tasks: int = 3,
    *,
    num_classes: int = 6,
    task_sizes: list[int] | None = None,
    stream: Any = "tasks",
    batch_size: int = 8,
    eval_batch_size: int = 16,
    train: int = 6,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (a constant)
) -> TaskSequence:
    """A task sequence over `tiny`."""
    splits = tiny(Path(), num_classes=num_classes, train=train)
    return TaskSequence(
        splits,
        class_order=list(range(num_classes)),
        task_sizes=split_task_sizes(num_classes, num_tasks, task_sizes),
        transforms=build_transforms("shift_flip", IMAGE_SIZE, [0.5] * 3, [0.5] * 3),
        loading=Loading(device, batch_size, eval_batch_size, seed),
        stream=stream,
    )


# ---- methods -----------------------------------------------------------------------------------------------------------------------


class Frozen(Method):
    """Trains nothing: scores are the distances to the mean feature of each class."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.means = nn.ParameterList()

    def end_task(self, task: Any) -> None:
        with torch.no_grad():
            sums, counts = torch.zeros(task.num_classes, self.heads.embed_dim), torch.zeros(task.num_classes, 1)
            for x, y in task.batches("test", stream="means"):
                if len(x):
                    sums.index_add_(0, y - task.num_old_classes, self.features(x))
                    counts.index_add_(0, y - task.num_old_classes, torch.ones(len(x), 1))
            self.means.append(sum_over_processes(sums) / sum_over_processes(counts))

    def param_groups(self) -> list[dict[str, Any]]:
        return []

    def predict(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.features(x), torch.cat(list(self.means)))

    def extra_state(self) -> dict[str, Any]:
        return {"num_means": len(self.means)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        sizes = state["head_sizes"][: state["num_means"]]
        self.means = nn.ParameterList(torch.zeros(size, self.heads.embed_dim) for size in sizes)


class TwoSteps(LinearProbe):
    """Two losses per batch: the second one is the first one again, after a step."""

    def loss(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for _ in range(2):
            yield self.local_cross_entropy(self.features(x), y)


class Diverging(LinearProbe):
    """Its loss is NaN from the given step of the given task on."""

    def __init__(self, backbone: nn.Module, *, task: int, step: int) -> None:
        super().__init__(backbone)
        self.bad_task, self.bad_step = task, step
        self.steps = 0

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        self.steps = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y)
        self.steps += 1
        assert isinstance(loss, Tensor)
        return loss * float("nan") if (self.task.index, self.steps) >= (self.bad_task, self.bad_step + 1) else loss
