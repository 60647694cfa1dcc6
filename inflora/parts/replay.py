"""Replay: raw images of earlier batches and tasks, kept in a buffer and trained on again beside the new ones."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inflora.data.tasks import Task, similar_sizes
from inflora.device import to_device
from inflora.parts.collective import gather_over_processes, num_processes
from inflora.parts.tuning import TunedMethod
from inflora.seeding import uniform

Selection = Literal["balanced", "reservoir"]


class ReplayBuffer:
    """Training images as they are stored (uint8, un-augmented, of any size) with their labels, and scores if the method gives some.

    Which images stay is decided by priorities: those with the smallest, of each class ("balanced") or of all ("reservoir"). Random
    priorities make every distinct image of the stream as likely to be in the buffer as any other, as reservoir sampling does; but they
    belong to the image, so an image that comes again in a later epoch is not counted twice, and neither the order of the images nor the
    number of processes matters. The images live in host memory: a buffer of large ones need not fit on the device.

    Attributes:
        images: (3, H, W) uint8 each, on the CPU, ordered by label and priority.
        labels, priorities: (n,) int64.
        ids: (n,) int64, which image of which task.
        scores: (n, C) float32 logits given at insertion, on the device they were given on; zero beyond `num_known`.
        num_known: (n,) int64, the number of classes they cover.

    Args:
        selection: "balanced" or "reservoir".
        buffer_size: most images in all; None: no bound.
        per_class: most images of a class; None: no bound. "balanced" with a `buffer_size` gives every seen class an equal share of it, at
            least one image.

    Raises:
        ValueError: if the arguments do not go together.
    """

    def __init__(self, *, selection: Selection, buffer_size: int | None, per_class: int | None) -> None:
        if selection not in ("balanced", "reservoir"):
            raise ValueError(f"method.selection={selection} is not known; choose balanced or reservoir")
        for name, value in (("buffer_size", buffer_size), ("per_class", per_class)):
            if value is not None and value < 1:
                raise ValueError(f"method.{name}={value} is below 1; choose a number of images, or null for no bound")
        if selection == "reservoir" and (buffer_size is None or per_class is not None):
            raise ValueError("method.selection=reservoir needs method.buffer_size, a number of images, and method.per_class=null")
        if buffer_size is None and per_class is None:
            raise ValueError("method.buffer_size and method.per_class are both null; choose a number of images for one of them")
        self.selection, self.buffer_size, self.per_class = selection, buffer_size, per_class
        self.key = int(torch.randint(2**62, ()))
        self.images: list[Tensor] = []
        self.labels, self.priorities, self.ids, self.num_known = (torch.zeros(0, dtype=torch.int64) for _ in range(4))
        self.scores = torch.zeros(0, 0)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_bytes(self) -> int:
        """Bytes of the images and scores."""
        return sum(image.numel() for image in self.images) + 4 * self.scores.numel()

    def quota(self, num_classes: int) -> int:
        """Images of a class in a balanced buffer when so many classes have been seen."""
        bounds = [] if self.per_class is None else [self.per_class]
        if self.buffer_size is not None:
            bounds.append(max(1, self.buffer_size // num_classes))
        return min(bounds)

    # ---- filling ----

    def offer(
        self, task: Task, positions: Tensor, *, num_classes: int, priorities: Tensor | None = None, scores: Tensor | None = None
    ) -> None:
        """Let training images compete for places; those in the buffer already are passed over.

        Args:
            task: whose images they are.
            positions: (b,) positions within the task's training images, each once; the same in every process.
            num_classes: classes seen so far.
            priorities: (b,) int64, the smallest win; None: random ones.
            scores: (b, C) logits to keep with the images, on any device; either always given or never.
        """
        is_new = ~torch.isin(_ids(task, positions), self.ids)
        if not is_new.any():
            return
        positions = positions[is_new]
        ids = _ids(task, positions)
        all_labels = torch.cat([self.labels, task.train_labels[positions]])
        all_priorities = torch.cat([self.priorities, self._random(ids) if priorities is None else priorities[is_new]])
        order = all_priorities.argsort(stable=True)
        order = order[all_labels[order].argsort(stable=True)]
        order = order[self._wins(all_labels[order], all_priorities[order], num_classes)]
        arrives = order >= len(self)
        winners = order[arrives] - len(self)
        arrived = iter(_raw(task, positions[winners]))
        self.images = [next(arrived) if row >= len(self) else self.images[row] for row in order.tolist()]
        self.labels, self.priorities, self.ids = all_labels[order], all_priorities[order], torch.cat([self.ids, ids])[order]
        if scores is not None:
            device, width = scores.device, scores.shape[1]
            new_scores = scores[to_device(is_new.nonzero().squeeze(1), device)].float()
            self.scores = torch.cat([_widen(to_device(self.scores, device), width), new_scores])[to_device(order, device)]
            self.num_known = torch.cat([self.num_known, torch.full((len(positions),), width)])[order]

    def _random(self, ids: Tensor) -> Tensor:
        """(b,) int64 with 48 random bits that depend only on the buffer's key and the image."""
        high, low = (uniform(self.key, ids, 2).double() * 2**24).long().unbind(1)
        return high << 24 | low

    def _wins(self, labels: Tensor, priorities: Tensor, num_classes: int) -> Tensor:
        """(n,) which images stay, given all in order of label and priority."""
        if self.selection == "reservoir":
            wins = torch.zeros(len(labels), dtype=torch.bool)
            wins[priorities.argsort()[: self.buffer_size]] = True
            return wins
        counts = labels.bincount()
        rank_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
        return rank_in_class < self.quota(num_classes)

    def refresh(self, task: Task, positions: Tensor, scores: Tensor) -> None:
        """Replace the scores of those of these images that are in the buffer; `scores` (b, C) covers C classes."""
        image, row = (_ids(task, positions).unsqueeze(1) == self.ids).nonzero().unbind(1)
        if len(row) == 0:
            return
        device = scores.device
        new_scores = scores[to_device(image, device)].float()
        self.scores = _widen(to_device(self.scores, device), scores.shape[1]).index_copy(0, to_device(row, device), new_scores)
        self.num_known = self.num_known.index_fill(0, row, scores.shape[1])

    # ---- taking ----

    def draw(self, key: int, sample_ids: Tensor, count: int) -> Tensor:
        """Rows drawn uniformly, with replacement: `count` for each of `sample_ids` (b,), depending on (key, id) only; (b * count,)."""
        rows = (uniform(key, sample_ids, count).double() * len(self)).long()
        return rows.clamp_(max=len(self) - 1).flatten()

    def prepare(self, task: Task, rows: Tensor, *, key: int | None = None, ids: Tensor | None = None) -> Tensor:
        """The images `rows` (b,) as the network sees them, (b, 3, S, S) on the device: see `Task.prepare`."""
        images = [self.images[row] for row in rows.tolist()]
        sizes = torch.tensor([image.shape[1:] for image in images])
        chunks = similar_sizes(sizes)
        x = [
            task.prepare(*_padded([images[i] for i in chunk], sizes[chunk]), key=key, ids=None if ids is None else ids[chunk])
            for chunk in chunks
        ]
        return torch.cat(x)[to_device(torch.cat(chunks).argsort(), x[0].device)]

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        pixels = [image.flatten() for image in self.images]
        return {
            "key": self.key,
            "pixels": torch.cat(pixels) if pixels else torch.zeros(0, dtype=torch.uint8),
            "sizes": torch.tensor([image.shape[1:] for image in self.images], dtype=torch.int64).view(-1, 2),
            **{name: getattr(self, name) for name in ("labels", "priorities", "ids", "num_known", "scores")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.key = state["key"]
        sizes = state["sizes"].tolist()
        pixels = state["pixels"].cpu().split([3 * h * w for h, w in sizes]) if sizes else ()
        self.images = [flat.view(3, h, w).clone() for flat, (h, w) in zip(pixels, sizes, strict=True)]
        for name in ("labels", "priorities", "ids", "num_known", "scores"):
            setattr(self, name, state[name].cpu().clone())


def _ids(task: Task, positions: Tensor) -> Tensor:
    """One number for each training image of the run."""
    return (task.index << 32) + positions


def _raw(task: Task, positions: Tensor) -> list[Tensor]:
    """The images at these positions, each (3, H, W) uint8 of its own on the CPU."""
    if len(positions) == 0:
        return []
    images, sizes = task.raw(positions)
    true_sizes = [images.shape[2:]] * len(images) if sizes is None else sizes.tolist()
    return [image[:, :h, :w].clone() for image, (h, w) in zip(images, true_sizes, strict=True)]


def _padded(images: list[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images as `Task.raw` gives them."""
    if (sizes == sizes[0]).all():
        return torch.stack(images), None
    height, width = sizes.amax(0).tolist()
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]), sizes


def _widen(scores: Tensor, width: int) -> Tensor:
    return F.pad(scores, (0, width - scores.shape[1]))


def gather_ids(sample_ids: Tensor, device: torch.device) -> Tensor:
    """The sample ids of all processes, on the CPU; `device` is where the processes exchange tensors."""
    return gather_over_processes(sample_ids.to(device)).cpu() if num_processes() > 1 else sample_ids


class ReplayMethod(TunedMethod):
    """Frame of methods that replay in every step: each image of a step enters the competition for the buffer after the step.

    Every new image brings replayed ones of its own, chosen and augmented by its `sample_ids`: so the processes of a run replay what one
    process would, and each of them as much as it has new images, which is how the trainer weighs them.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["peft", "full"],
        rank: int,
        blocks: list[int] | None,
        selection: Selection,
        buffer_size: int | None,
        per_class: int | None,
    ) -> None:
        super().__init__(backbone, variant=variant, rank=rank, blocks=blocks)
        self.buffer = ReplayBuffer(selection=selection, buffer_size=buffer_size, per_class=per_class)

    def replay(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` augmented images of the buffer for each image of the batch.

        Returns:
            x (b * count, 3, S, S) on the device, and their rows in the buffer.
        """
        key, augment_key = torch.randint(2**62, (2,)).tolist()
        rows = self.buffer.draw(key, self.sample_ids, count)
        ids = (self.sample_ids.unsqueeze(1) * count + torch.arange(count)).flatten()
        return self.buffer.prepare(self.task, rows, key=augment_key, ids=ids), rows

    def after_step(self) -> None:
        positions = gather_ids(self.sample_ids, self.device)
        self.buffer.offer(self.task, positions, num_classes=self.heads.num_classes)

    def diagnostics(self) -> dict[str, Any]:
        return {"buffer_images": len(self.buffer), "buffer_megabytes": self.buffer.num_bytes / 1e6}

    def extra_state(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
