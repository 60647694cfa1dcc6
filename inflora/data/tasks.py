"""The task sequence: class order, task sizes, subsets, and the batches of each task.

Labels inside a run are *internal*: the position of a class in `class_order`. Task t therefore owns a contiguous range of labels, and the
classes seen so far are always 0..k-1.
"""

import itertools
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from inflora.data.cache import ImageStore, map_ahead
from inflora.data.datasets import Splits, hash_paths, rows_by_class
from inflora.device import pinned, to_device
from inflora.seeding import generator, stream_seed, uniform

if TYPE_CHECKING:
    from inflora.data.transforms import Transform

log = logging.getLogger(__name__)

RESIDENT_BYTES = 2 * 2**30
"""Images of one size live on the device as uint8 where all of a set's take at most this (CIFAR-100's: 154 MB); else threads fetch ahead."""

CHUNK_BYTES = 64 * 2**20
"""Images of different sizes are padded to a common one; batches are transformed in chunks of similar sizes, each padded to at most this."""


# ---------------------------------------------------------------------------------------------------------------- order and sizes


def parse_class_order(spec: str | Sequence[int], num_classes: int, seed: int) -> list[int]:
    """The order in which classes are learned, as a list of the data set's class ids.

    Args:
        spec: `dataset.class_order`: "natural"; "numpy:<s>", the permutation of NumPy's legacy generator; "python:<s>", a shuffle by
            Python's `random` (0 is the natural order, as in CODA-Prompt's first trial); either with "+seed" to add the run's seed;
            or a list.
        num_classes: classes of the data set.
        seed: the run's seed, used by "+seed" alone.

    Raises:
        ValueError: if the text is none of these, or the list is not a permutation of 0..num_classes-1.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return _check_permutation(list(spec), num_classes)
    if spec == "natural":
        return list(range(num_classes))
    match = re.fullmatch(r"(numpy|python):(\d+)(\+seed)?", str(spec))
    if match is None:
        raise ValueError(
            f"dataset.class_order={spec} is unknown; choose natural, numpy:1993, python:1 (any number; +seed adds the run's seed), or a "
            "list of all class ids"
        )
    order_seed = int(match[2]) + (seed if match[3] else 0)
    if match[1] == "numpy":
        return np.random.RandomState(order_seed).permutation(num_classes).tolist()
    order = list(range(num_classes))
    if order_seed > 0:
        random.Random(order_seed).shuffle(order)
    return order


def _check_permutation(order: list[int], num_classes: int) -> list[int]:
    if any(isinstance(class_id, list) for class_id in order):
        raise ValueError("dataset.class_order must be one flat list of class ids; dataset.task_sizes says how many a task has")
    allowed = set(range(num_classes))
    faults = {
        "has unknown": [class_id for class_id in order if class_id not in allowed],
        "repeats": [class_id for class_id, count in Counter(order).items() if count > 1],
        "lacks": sorted(allowed - set(order)),
    }
    if any(faults.values()):
        text = ", ".join(f"{fault} {_shorten(ids)}" for fault, ids in faults.items() if ids)
        raise ValueError(f"dataset.class_order must list every class id 0..{num_classes - 1} once; the list {text}")
    return order


def _shorten(items: Sequence[object], limit: int = 5) -> str:
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def split_task_sizes(num_classes: int, num_tasks: int, task_sizes: Sequence[int] | None = None) -> list[int]:
    """Classes per task.

    Args:
        num_classes: classes of the data set.
        num_tasks: `dataset.num_tasks`: equal tasks; where it does not divide the classes the first tasks get one more.
        task_sizes: `dataset.task_sizes`: explicit sizes, which win over `num_tasks`.

    Raises:
        ValueError: if there are more tasks than classes, or the explicit sizes do not add up to the classes.
    """
    if task_sizes is not None:
        sizes = list(task_sizes)
        if min(sizes, default=0) < 1 or sum(sizes) != num_classes:
            raise ValueError(
                f"dataset.task_sizes={sizes} adds up to {sum(sizes)}; give positive numbers that add up to the {num_classes} classes"
            )
        return sizes
    if not 1 <= num_tasks <= num_classes:
        raise ValueError(f"dataset.num_tasks={num_tasks} does not fit {num_classes} classes; choose 1..{num_classes}")
    size, rest = divmod(num_classes, num_tasks)
    return [size + (task < rest) for task in range(num_tasks)]


def class_to_task(sizes: Sequence[int], device: torch.device) -> Tensor:
    """(classes,) long on `device`: internal label -> task, where the tasks have so many classes."""
    return to_device(torch.repeat_interleave(torch.tensor(sizes)), device)


# ------------------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Loading:
    """How batches are made.

    Attributes:
        device: where batches are delivered and transforms run.
        batch_size: images per training batch, over all processes.
        eval_batch_size: images per batch whenever images are visited in order; changes no result.
        seed: the run's seed, for order and augmentation.
        num_workers: threads that fetch ahead where the images do not live on the device; 0: fetch when needed.
        rank: this process.
        world_size: number of processes.
    """

    device: torch.device
    batch_size: int
    eval_batch_size: int
    seed: int
    num_workers: int = 1
    rank: int = 0
    world_size: int = 1


class _Pool:
    """The images of one set, by row: from a copy that lives on the device where it fits, else from the store in host memory."""

    def __init__(self, store: ImageStore, device: torch.device) -> None:
        self.store, self._device = store, device
        self.is_resident = store.sizes is None and store.nbytes <= RESIDENT_BYTES

    @cached_property
    def _resident(self) -> Tensor:
        return self.store.fetch(torch.arange(len(self.store)))[0].to(self._device)

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `ImageStore.fetch`."""
        if self.is_resident:
            return self._resident[to_device(rows, self._device)], None
        images, sizes = self.store.fetch(rows)
        return pinned(images, self._device), sizes  # by the thread that reads ahead

    def chunks(self, rows: Tensor) -> list[Tensor]:
        """Positions in `rows` (B,) to load together: all where images have one size, else groups of similar size."""
        if self.store.sizes is None:
            return [torch.arange(len(rows))]
        return similar_sizes(self.store.sizes[rows])


def similar_sizes(sizes: Tensor) -> list[Tensor]:
    """Images (n, 2 = height and width) in groups of similar size: positions to pad to a common size, at most `CHUNK_BYTES` at a time."""
    groups: list[list[int]] = []
    height = width = 0
    for position in sizes.prod(1).argsort(stable=True).tolist():
        h, w = sizes[position].tolist()
        height, width = max(height, h), max(width, w)
        if not groups or 3 * height * width * (len(groups[-1]) + 1) > CHUNK_BYTES:
            groups.append([])
            height, width = h, w
        groups[-1].append(position)
    return [torch.tensor(sorted(group)) for group in groups]


_Loaded = tuple[Tensor, int, list[tuple[Tensor, Tensor, Tensor | None]]]
"""One process's part of a batch: positions in the pass, how many of them count, and chunks of (positions, images, sizes)."""


class Batches:
    """One pass over some images of a task: an iterable of `(x, y)`.

    `x` is float32 (b, 3, S, S) and `y` long (b,), internal labels, both on the device. With several processes each gets the elements
    rank::world_size of every global batch, so the processes together see exactly the batches of one process; b may be 0.
    """

    def __init__(
        self,
        pool: _Pool,
        rows: Tensor,
        labels: Tensor,
        order: Tensor,
        transform: "Transform",
        *,
        batch_size: int,
        loading: Loading,
        augment_key: int | None = None,
    ) -> None:
        """Args:
        rows: rows of the pool, one for each image of the task.
        labels: internal labels of these rows.
        order: (n,) positions in these two, in the order of the pass.
        augment_key: the stream of the transform's random draws; None for a transform that draws none.
        """
        self._pool, self._rows, self._labels, self._order, self._transform = pool, rows[order], labels[order], order, transform
        self._batch_size, self._loading, self._augment_key = batch_size, loading, augment_key

    @property
    def num_images(self) -> int:
        """Images of the pass, over all processes."""
        return len(self._rows)

    def __len__(self) -> int:
        return -(-self.num_images // self._batch_size)

    def global_size(self, step: int) -> int:
        """Images of batch `step`, over all processes."""
        return min(self._batch_size, self.num_images - step * self._batch_size)

    def sample_ids(self, step: int) -> Tensor:
        """(b,) positions of this process's part of batch `step` within the task's images; on the CPU."""
        return self._order[self._positions(step)]

    def _positions(self, step: int) -> Tensor:
        """(b,) positions in the pass of this process's part of batch `step`."""
        start = step * self._batch_size
        return torch.arange(start, start + self.global_size(step))[self._loading.rank :: self._loading.world_size]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from `step` on; those before it are not even read."""
        labels = to_device(self._labels, self._loading.device)
        for positions, size, chunks in self._loaded(range(step, len(self))):
            x = torch.cat([self._transformed(where, images, sizes) for where, images, sizes in chunks])
            if len(chunks) > 1:  # back to the order of the pass
                x = x[to_device(torch.cat([where for where, _, _ in chunks]).argsort(), x.device)]
            yield x[:size], labels[to_device(positions[:size], labels.device)]

    def _loaded(self, steps: range) -> Iterator[_Loaded]:
        num_workers = self._loading.num_workers
        if self._pool.is_resident or num_workers == 0:
            return map(self._load, steps)
        return map_ahead(self._load, steps, num_workers, ahead=num_workers + 1)

    def _load(self, step: int) -> _Loaded:
        """This process's images of batch `step`."""
        positions = self._positions(step)
        size = len(positions)
        if size == 0:  # one image, dropped again after the transform, tells the shape of x
            positions = torch.tensor([step * self._batch_size])
        chunks = [positions[chunk] for chunk in self._pool.chunks(self._rows[positions])]
        return positions, size, [(chunk, *self._pool.fetch(self._rows[chunk])) for chunk in chunks]

    def _transformed(self, positions: Tensor, images: Tensor, sizes: Tensor | None) -> Tensor:
        device = self._loading.device
        images = to_device(images, device)
        sizes = None if sizes is None else to_device(sizes, device)
        draws = None
        if self._augment_key is not None and self._transform.num_draws > 0:
            draws = to_device(uniform(self._augment_key, self._rows[positions], self._transform.num_draws), device)
        return self._transform(images, sizes, draws)


# -------------------------------------------------------------------------------------------------------------------------- tasks


class Task:
    """One task: a set of classes with their training and test images.

    Attributes:
        index: 0-based position in the sequence.
        num_tasks: tasks of the whole sequence, known in advance.
        num_classes: classes of this task.
        num_old_classes: classes of the tasks before it; this task's internal labels follow on from there.
        class_ids: the data set's ids of the classes, in learning order.
        class_names: their names.
        num_train, num_test: images.
        train_labels: (num_train,) internal labels, in the order of `batches("test")`.
    """

    def __init__(
        self,
        index: int,
        num_tasks: int,
        num_old_classes: int,
        class_ids: list[int],
        class_names: list[str],
        *,
        train: tuple[_Pool, Tensor, Tensor],
        test: tuple[_Pool, Tensor, Tensor],
        transforms: "tuple[Transform, Transform]",
        loading: Loading,
    ) -> None:
        """Args:
        train, test: the pool, and the task's rows and internal labels in it.
        """
        self.index, self.num_tasks, self.num_old_classes = index, num_tasks, num_old_classes
        self.class_ids, self.class_names = class_ids, class_names
        self.num_classes = len(class_ids)
        self._train, self._test = train, test
        self._transforms, self._loading = transforms, loading
        self.train_labels = train[2]
        self.num_train, self.num_test = len(train[1]), len(test[1])

    def batches(self, view: Literal["train", "test"], *, stream: str, epoch: int = 0) -> Batches:
        """A pass over the task's training images.

        Args:
            view: "train": shuffled and augmented; "test": in a fixed order, as test images are prepared.
            stream: what the pass is for ("fit", "subspace", ...): each stream has its own order and augmentation.
            epoch: which pass of the stream; the same (seed, stream, task, epoch) always gives the same batches.
        """
        pool, rows, labels = self._train
        seed = self._loading.seed
        if view == "test":
            order = torch.arange(len(rows))
            return Batches(pool, rows, labels, order, self._transforms[1], batch_size=self._loading.eval_batch_size, loading=self._loading)
        order = torch.randperm(len(rows), generator=generator(seed, f"{stream}:order", self.index, epoch))
        return Batches(
            pool,
            rows,
            labels,
            order,
            self._transforms[0],
            batch_size=self._loading.batch_size,
            loading=self._loading,
            augment_key=stream_seed(seed, f"{stream}:augment", self.index, epoch),
        )

    def raw(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Training images as they are stored: what a replay buffer keeps.

        Args:
            positions: (n,) positions within the task's training images, as `Method.sample_ids` are.

        Returns:
            uint8 (n, 3, H, W) in host memory, padded with zeros at the bottom and right, and their true (n, 2) height and width; None in
            place of the latter where all images of the data set have one size.
        """
        pool, rows, _ = self._train
        return pool.store.fetch(rows[positions])

    def prepare(self, images: Tensor, sizes: Tensor | None, *, key: int | None = None, ids: Tensor | None = None) -> Tensor:
        """Raw images, of this task or another, as `batches` delivers them: float32 (n, 3, S, S) on the device.

        Args:
            images, sizes: as `raw` returns them, on any device.
            key: augment as in training, with draws that depend only on this number and on `ids`; None: as test images.
            ids: (n,) integers that tell the images apart.
        """
        transform = self._transforms[1] if key is None else self._transforms[0]
        device = self._loading.device
        draws = None
        if key is not None and transform.num_draws > 0:
            assert ids is not None, "augmentation needs ids"
            draws = to_device(uniform(key, ids, transform.num_draws), device)
        return transform(to_device(images, device), None if sizes is None else to_device(sizes, device), draws)

    def test_batches(self, limit: int | None = None) -> Batches:
        """A pass over the task's test images, in order; with `limit`, over that many, evenly spaced."""
        pool, rows, labels = self._test
        order = torch.arange(len(rows))
        if limit is not None and limit < len(rows):
            order = torch.linspace(0, len(rows) - 1, limit).round().long()
        return Batches(pool, rows, labels, order, self._transforms[1], batch_size=self._loading.eval_batch_size, loading=self._loading)


class TaskSequence:
    """The training stages of a run, and the tasks they are tested on.

    With `stream="tasks"` the stages are the tasks. With `stream="joint"` there is one stage, with every class, tested on all tasks.

    Attributes:
        num_tasks: tasks of the sequence (also under "joint").
        num_classes: classes of the data set.
        task_sizes: classes per task.
        class_order: the data set's class ids in learning order.
        class_to_task: (num_classes,) long, internal label -> task.
        tasks: the tasks.
        stream: "tasks" or "joint".
        split_id: how training and test images were told apart.
        test_counts: test images per task.
        test_hash, train_hash: identify the test and the training images of all tasks by their names (`hash_paths`), in any order.
        image_hashes: per task, identifies its training and test images, by their names.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        class_order: list[int],
        task_sizes: list[int],
        transforms: "tuple[Transform, Transform]",
        loading: Loading,
        stream: Literal["tasks", "joint"] = "tasks",
        validation_fraction: float = 0.0,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
    ) -> None:
        """Args:
            splits: the data set.
            class_order: as `parse_class_order` returns it.
            task_sizes: as `split_task_sizes` returns it.
            transforms: for training and for test.
            validation_fraction: share of every class's training images that takes the place of the test images; they are always the
                same ones, so runs of different seeds stay comparable.
            max_train_per_class, max_test_per_class: keep the first n of a permutation of each class's images that depends on nothing else.

        Raises:
            ValueError: if one of the last three is out of range, or a task ends up without training or test images.
        """
        self.num_classes = len(splits.class_names)
        assert sorted(class_order) == list(range(self.num_classes)) and sum(task_sizes) == self.num_classes
        self.class_order, self.task_sizes, self.num_tasks = class_order, task_sizes, len(task_sizes)
        self.class_to_task = class_to_task(task_sizes, torch.device("cpu"))
        train_rows, test_rows = _select_rows(splits, validation_fraction, max_train_per_class, max_test_per_class)
        test_set = splits.train if validation_fraction > 0 else splits.test
        train_pool = _Pool(splits.train.images, loading.device)
        test_pool = train_pool if test_set is splits.train else _Pool(test_set.images, loading.device)

        def make_task(index: int, num_tasks: int, start: int, stop: int) -> Task:
            ids = class_order[start:stop]
            return Task(
                index,
                num_tasks,
                start,
                ids,
                [splits.class_names[class_id] for class_id in ids],
                train=(train_pool, *_rows_and_labels(train_rows, ids, start)),
                test=(test_pool, *_rows_and_labels(test_rows, ids, start)),
                transforms=transforms,
                loading=loading,
            )

        bounds = list(itertools.accumulate(task_sizes, initial=0))
        self.tasks = [make_task(t, self.num_tasks, *bounds[t : t + 2]) for t in range(self.num_tasks)]
        self._stages = self.tasks if stream == "tasks" else [make_task(0, 1, 0, self.num_classes)]
        self.stream = stream
        self.test_counts = [task.num_test for task in self.tasks]
        self.split_id = splits.split_id + (f" validation:{validation_fraction}" if validation_fraction > 0 else "")
        self.test_hash = hash_paths([test_set.paths[row] for row in torch.cat(test_rows).tolist()])
        self.train_hash = hash_paths([splits.train.paths[row] for row in torch.cat(train_rows).tolist()])
        self.image_hashes = [
            hash_paths(
                [f"train {splits.train.paths[row]}" for class_id in task.class_ids for row in train_rows[class_id].tolist()]
                + [f"test {test_set.paths[row]}" for class_id in task.class_ids for row in test_rows[class_id].tolist()]
            )
            for task in self.tasks
        ]
        _check_images(splits.class_names, train_rows, test_rows, self.tasks)

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._stages)

    def __getitem__(self, stage: int) -> Task:
        return self._stages[stage]

    def seen(self, task: Task) -> list[Task]:
        """The tasks to test after the training stage `task`."""
        return self.tasks if self.stream == "joint" else self.tasks[: task.index + 1]


def _shuffle_class(rows: Tensor, kind: str, class_name: str) -> Tensor:
    """The rows of one class in an order that depends on its name and number of images alone."""
    return rows[torch.randperm(len(rows), generator=generator(0, f"subset:{kind}:{class_name}"))]


def _select_rows(splits: Splits, fraction: float, max_train: int | None, max_test: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Per class, the rows used for training and for testing, ascending."""
    if not 0 <= fraction < 1:
        raise ValueError(f"dataset.validation_fraction={fraction} is out of range; choose 0 (test on the test images) up to below 1")
    for name, limit in (("max_train_per_class", max_train), ("max_test_per_class", max_test)):
        if limit is not None and limit < 1:
            raise ValueError(f"dataset.{name}={limit} is out of range; choose 1 or more, or null for all images")
    train_rows, test_rows = [], []
    by_class = (rows_by_class(images.labels, len(splits.class_names)) for images in (splits.train, splits.test))
    for name, train, test in zip(splits.class_names, *by_class, strict=True):
        train = _shuffle_class(train, "train", name)
        if fraction > 0:
            # Held out from the end, so that `max_train_per_class` chooses the same images with and without validation.
            num_kept = len(train) - min(max(1, round(fraction * len(train))), len(train) - 1)
            train, test = train[:num_kept], train[num_kept:]
        else:
            test = _shuffle_class(test, "test", name)
        train_rows.append(train[:max_train].sort().values)
        test_rows.append(test[:max_test].sort().values)
    return train_rows, test_rows


def _rows_and_labels(rows_by_class: list[Tensor], class_ids: list[int], first_label: int) -> tuple[Tensor, Tensor]:
    rows = torch.cat([rows_by_class[class_id] for class_id in class_ids])
    counts = torch.tensor([len(rows_by_class[class_id]) for class_id in class_ids])
    return rows, torch.repeat_interleave(counts) + first_label


def _check_images(class_names: list[str], train_rows: list[Tensor], test_rows: list[Tensor], tasks: list[Task]) -> None:
    for kind, rows in (("training", train_rows), ("test", test_rows)):
        empty = [name for name, own in zip(class_names, rows, strict=True) if len(own) == 0]
        if empty:
            log.warning("no %s images of %d of %d classes: %s", kind, len(empty), len(class_names), _shorten(empty))
    for task in tasks:
        for kind, count in (("training", task.num_train), ("test", task.num_test)):
            if count == 0:
                raise ValueError(
                    f"task {task.index} (classes {_shorten(task.class_names)}) has no {kind} images; "
                    "give every class some in dataset.root, or choose fewer, larger tasks with dataset.num_tasks"
                )
