"""Class orders, task sizes, subsets and batches."""

import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inflora.data import tasks
from inflora.data.cache import FixedImages, ImageStore, VariableImages
from inflora.data.datasets import ImageSet, Splits, digits, hash_paths
from inflora.data.tasks import Batches, Loading, TaskSequence, _select_rows, parse_class_order, split_task_sizes
from inflora.data.transforms import build_transforms

LOADING = Loading(device=torch.device("cpu"), batch_size=5, eval_batch_size=7, seed=0, num_workers=2)

# First ten classes of every order of the protocol, for 100, 200 and 345 classes.
ORDERS = """
numpy:1993 | 68 56 78 8 23 84 90 65 74 76 | 168 136 51 9 183 101 171 99 42 159 | 214 80 343 268 224 97 253 55 165 170
numpy:1994 | 72 6 33 96 60 94 29 40 45 66 | 85 41 23 28 70 87 134 151 51 159 | 24 4 28 201 265 334 149 306 294 328
numpy:1995 | 91 18 57 73 66 71 68 61 44 54 | 146 198 169 126 142 183 108 86 79 35 | 131 270 267 342 142 151 107 105 150 111
numpy:1996 | 35 18 40 85 63 62 77 73 12 44 | 92 182 15 79 26 173 109 188 27 157 | 92 216 19 31 223 173 155 140 314 242
numpy:1997 | 88 77 36 54 92 4 11 24 71 31 | 76 153 53 4 197 152 176 43 64 112 | 140 118 102 1 214 159 55 54 15 198
numpy:0 | 26 86 2 55 75 93 16 73 54 95 | 18 170 107 98 177 182 5 146 12 152 | 142 6 60 339 54 286 126 217 254 100
python:1 | 53 37 65 51 4 20 38 9 10 81 | 33 146 79 19 23 131 12 187 174 32 | 300 209 181 77 120 227 211 231 229 111
python:2 | 0 76 61 63 1 71 2 6 16 19 | 51 94 55 35 170 177 20 85 50 36 | 231 331 50 164 170 165 241 262 242 251
python:3 | 35 41 45 4 76 12 0 64 42 11 | 158 62 14 69 47 137 110 6 116 88 | 134 107 292 235 11 40 13 260 9 181
python:4 | 73 86 82 23 1 42 57 40 76 69 | 136 126 189 51 145 98 0 68 40 4 | 330 234 129 138 111 294 57 262 150 177
natural | 0 1 2 3 4 5 6 7 8 9 | 0 1 2 3 4 5 6 7 8 9 | 0 1 2 3 4 5 6 7 8 9
python:0 | 0 1 2 3 4 5 6 7 8 9 | 0 1 2 3 4 5 6 7 8 9 | 0 1 2 3 4 5 6 7 8 9
"""


def toy_splits(num_classes: int = 6, per_class: int = 10, size: int | None = 8) -> Splits:
    """Random images, classes interleaved; of one size, or of all sizes from 3x3 to 12x12."""
    rng = np.random.default_rng(0)

    def image_set(name: str, count: int) -> ImageSet:
        labels = torch.arange(count * num_classes) % num_classes
        if size is None:
            sizes = torch.from_numpy(rng.integers(3, 13, (len(labels), 2)))
            flat = rng.integers(0, 256, int(3 * sizes.prod(1).sum()), dtype=np.uint8)
            store: ImageStore = VariableImages(flat, sizes)
        else:
            store = FixedImages(torch.from_numpy(rng.integers(0, 256, (len(labels), 3, size, size), dtype=np.uint8)))
        return ImageSet(store, labels, [f"{name}/{label}/{row}" for row, label in enumerate(labels.tolist())])

    return Splits(image_set("train", per_class), image_set("test", 4), [f"class {label}" for label in range(num_classes)], "toy")


def sequence(splits: Splits | None = None, order: list[int] | None = None, sizes: list[int] | None = None, **options) -> TaskSequence:
    splits = splits or toy_splits()
    num_classes = len(splits.class_names)
    defaults = {"transforms": build_transforms("shift_flip", 8), "loading": LOADING}
    order = order or list(range(num_classes))
    return TaskSequence(splits, class_order=order, task_sizes=sizes or split_task_sizes(num_classes, 3), **(defaults | options))


def collect(batches: Batches) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


# --------------------------------------------------------------------------------------------------------- class orders and task sizes


@pytest.mark.parametrize("line", ORDERS.strip().splitlines())
def test_class_orders_of_the_protocol(line: str) -> None:
    spec, *expected = (part.strip() for part in line.split("|"))
    for num_classes, ten in zip((100, 200, 345), expected, strict=True):
        order = parse_class_order(spec, num_classes, seed=7)
        assert order[:10] == [int(class_id) for class_id in ten.split()]
        assert sorted(order) == list(range(num_classes))


def test_run_seed_moves_only_orders_that_say_so() -> None:
    assert parse_class_order("numpy:1993+seed", 100, seed=2) == parse_class_order("numpy:1995", 100, seed=0)
    assert parse_class_order("python:1+seed", 100, seed=3) == parse_class_order("python:4", 100, seed=0)
    assert parse_class_order("numpy:1993", 100, seed=2) == parse_class_order("numpy:1993", 100, seed=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("random", "dataset.class_order=random is unknown; choose natural, numpy:1993"),
        ("numpy:x", "dataset.class_order=numpy:x is unknown"),
        (3, "dataset.class_order=3 is unknown"),
        ([0, 1, 1], "every class id 0..3 once; the list repeats 1, lacks 2, 3"),
        ([0, 1, 2, 4], "every class id 0..3 once; the list has unknown 4, lacks 3"),
        (["a", 1, 2, 3], "the list has unknown a, lacks 0"),
        ([], "the list lacks 0, 1, 2, 3"),
        ([[0, 1], [2, 3]], "must be one flat list of class ids; dataset.task_sizes says how many a task has"),
    ],
)
def test_bad_class_orders(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_class_order(spec, 4, seed=0)  # type: ignore[arg-type]


def test_listed_order_is_taken() -> None:
    assert parse_class_order([2, 0, 1], 3, seed=0) == [2, 0, 1]


def test_task_sizes() -> None:
    assert split_task_sizes(100, 10) == [10] * 10
    assert split_task_sizes(10, 4) == [3, 3, 2, 2]
    assert split_task_sizes(5, 5) == [1] * 5
    assert split_task_sizes(10, 3, [8, 1, 1]) == [8, 1, 1]
    assert split_task_sizes(10, 99, [9, 1]) == [9, 1], "explicit sizes win over num_tasks"


@pytest.mark.parametrize(
    ("num_tasks", "sizes", "message"),
    [
        (11, None, "dataset.num_tasks=11 does not fit 10 classes; choose 1..10"),
        (0, None, "dataset.num_tasks=0 does not fit"),
        (2, [5, 4], r"dataset.task_sizes=\[5, 4\] adds up to 9; give positive numbers that add up to the 10 classes"),
        (2, [11, -1], "give positive numbers"),
        (2, [], "adds up to 0"),
    ],
)
def test_bad_task_sizes(num_tasks: int, sizes: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_task_sizes(10, num_tasks, sizes)


# ------------------------------------------------------------------------------------------------------------------------- sequences


def test_internal_labels_are_positions_in_the_class_order() -> None:
    splits, order = toy_splits(), [3, 0, 5, 1, 4, 2]
    found = sequence(splits, order, [3, 1, 2])
    assert found.class_to_task.tolist() == [0, 0, 0, 1, 2, 2]
    assert [task.class_ids for task in found] == [[3, 0, 5], [1], [4, 2]]
    assert [task.class_names for task in found][1] == ["class 1"]
    assert [(task.index, task.num_tasks, task.num_classes, task.num_old_classes) for task in found] == [
        (0, 3, 3, 0),
        (1, 3, 1, 3),
        (2, 3, 2, 4),
    ]
    plain = build_transforms("shift", 8)[1]
    rows = 0
    for task in found:
        for source, batches in ((splits.train, task.batches("test", stream="x")), (splits.test, task.test_batches())):
            images = plain(source.images.fetch(torch.arange(len(source.labels)))[0], None, None)
            for x, y in zip(*collect(batches), strict=True):
                row = int((images == x).flatten(1).all(1).nonzero())
                assert order[y] == source.labels[row]
                rows += 1
    assert rows == 6 * (10 + 4), "every image belongs to exactly one task"


def test_every_seen_task_is_tested() -> None:
    found = sequence()
    assert [[seen.index for seen in found.seen(task)] for task in found] == [[0], [0, 1], [0, 1, 2]]
    assert found.test_counts == [8, 8, 8] == [task.num_test for task in found.tasks]


def test_joint_stream_is_one_stage_tested_on_all_tasks() -> None:
    found = sequence(order=[5, 4, 3, 2, 1, 0], stream="joint")
    (stage,) = found
    assert len(found) == 1 and found.num_tasks == 3 and found[0] is stage
    assert (stage.index, stage.num_tasks, stage.num_classes, stage.num_old_classes, stage.num_train) == (0, 1, 6, 0, 60)
    assert [task.index for task in found.seen(stage)] == [0, 1, 2]
    _, labels = collect(stage.batches("train", stream="fit"))
    assert labels.bincount().tolist() == [10] * 6
    assert found.test_hash == sequence().test_hash


def test_train_labels_follow_the_test_view() -> None:
    for task in sequence(order=[3, 0, 5, 1, 4, 2]):
        assert torch.equal(task.train_labels, collect(task.batches("test", stream="x"))[1])


@pytest.mark.parametrize("per_class, fraction, kept", [(1, 0.5, 1), (2, 0.01, 1), (2, 0.99, 1), (10, 0.01, 9), (10, 0.99, 1)])
def test_validation_takes_an_image_of_a_class_and_leaves_one(per_class: int, fraction: float, kept: int) -> None:
    splits = toy_splits(2, per_class)
    train_rows, test_rows = _select_rows(splits, fraction, None, None)
    assert [len(rows) for rows in train_rows] == [kept] * 2
    assert [len(rows) for rows in test_rows] == [per_class - kept] * 2


def test_validation_takes_images_from_training_for_good() -> None:
    splits = toy_splits()
    plain, held = sequence(splits), sequence(splits, validation_fraction=0.2)
    assert [task.num_train for task in held] == [16] * 3 and held.test_counts == [4] * 3
    assert plain.test_hash != held.test_hash and held.split_id == "toy validation:0.2"
    rest, validation = (torch.cat([collect(b)[0] for b in batches]) for batches in _train_and_test_passes(held))
    every, test = (torch.cat([collect(b)[0] for b in batches]) for batches in _train_and_test_passes(plain))
    assert _images(rest) | _images(validation) == _images(every)
    assert not _images(rest) & _images(validation) and not _images(validation) & _images(test)
    other_seed = sequence(splits, validation_fraction=0.2, loading=replace(LOADING, seed=5))
    assert other_seed.test_hash == held.test_hash, "the validation images do not depend on the run's seed"


def _train_and_test_passes(found: TaskSequence) -> tuple[list[Batches], list[Batches]]:
    return [task.batches("test", stream="x") for task in found], [task.test_batches() for task in found]


def _images(x: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def test_subset_depends_on_nothing_else() -> None:
    splits = toy_splits()
    kept, tested = {}, {}
    for seed, order, fraction in ((0, None, 0.0), (3, [5, 4, 3, 2, 1, 0], 0.0), (0, None, 0.2)):
        found = sequence(
            splits, order, max_train_per_class=4, max_test_per_class=2, validation_fraction=fraction, loading=replace(LOADING, seed=seed)
        )
        assert [task.num_train for task in found] == [8] * 3 and found.test_counts == [4] * 3
        kept[seed, fraction] = _images(torch.cat([collect(task.batches("test", stream="x"))[0] for task in found]))
        tested[seed, fraction] = _images(torch.cat([collect(task.test_batches())[0] for task in found]))
    assert kept[0, 0.0] == kept[3, 0.0] == kept[0, 0.2]
    assert tested[0, 0.0] == tested[3, 0.0]
    first_two_of_every_class, _ = splits.test.images.fetch(torch.arange(12))
    assert tested[0, 0.0] != _images(build_transforms("shift_flip", 8)[1](first_two_of_every_class, None, None))
    larger = sequence(splits, max_train_per_class=6, max_test_per_class=3)
    assert kept[0, 0.0] < _images(torch.cat([collect(task.batches("test", stream="x"))[0] for task in larger]))
    assert tested[0, 0.0] < _images(torch.cat([collect(task.test_batches())[0] for task in larger]))
    assert sequence(splits, max_train_per_class=99)[0].num_train == 20


def test_subset_of_a_class_survives_new_classes() -> None:
    """A longer sequence over a folder that has grown keeps the images of its old tasks, though their class ids have moved."""

    def kept(names: str) -> set[int]:
        values = torch.tensor([10 * "abc".index(name) + k for k in range(8) for name in names], dtype=torch.uint8)
        labels = torch.arange(len(values)) % len(names)
        images = ImageSet(FixedImages(values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)), labels, [str(value) for value in values.tolist()])
        found = sequence(Splits(images, images, list(names), "toy"), sizes=[len(names)], max_train_per_class=3)
        x, _ = collect(found[0].batches("test", stream="x"))
        return {round(value) for value in (x[:, 0, 0, 0] * 255).tolist() if round(value) >= 10}

    assert len(kept("bc")) == 6
    assert kept("bc") == kept("abc")


@pytest.mark.parametrize(
    "options, train, test",
    [
        ({}, "0d9f1d9feffaaf13", "c4471dced85157cb"),
        ({"max_train_per_class": 20, "max_test_per_class": 5}, "e17f303558dbbdac", "e75fb79b41abe795"),
        ({"validation_fraction": 0.1}, "7cc2c2e6c4229a0c", "d015d379a5087530"),
    ],
)
def test_the_images_of_a_configuration_never_change(options, train, test) -> None:
    """Numbers of today are compared with those of other versions of this code: the hashes are written down."""
    found = sequence(digits(Path("unused")), **options)
    assert (found.train_hash[:16], found.test_hash[:16]) == (train, test)


def test_hash_is_of_the_sorted_test_paths() -> None:
    splits = toy_splits()
    found = sequence(splits, order=[3, 0, 5, 1, 4, 2])
    assert found.test_hash == hash_paths(splits.test.paths)
    assert found.train_hash == hash_paths(splits.train.paths)
    assert sequence(splits, max_train_per_class=1).train_hash != found.train_hash
    assert hash_paths(["b", "a"]) == "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2", "printf 'a\nb\n' | sha256sum"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "dataset.validation_fraction=1.0 is out of range"),
        ({"validation_fraction": -0.1}, "dataset.validation_fraction=-0.1 is out of range"),
        ({"max_train_per_class": 0}, "dataset.max_train_per_class=0 is out of range; choose 1 or more, or null"),
        ({"max_test_per_class": -1}, "dataset.max_test_per_class=-1 is out of range"),
    ],
)
def test_bad_subsets(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence(**options)


def test_task_without_test_images_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    splits = toy_splits()
    keep = splits.test.labels != 2
    store = FixedImages(splits.test.images.fetch(keep.nonzero().flatten())[0])
    paths = [path for path, kept in zip(splits.test.paths, keep, strict=True) if kept]
    lacking = Splits(splits.train, ImageSet(store, splits.test.labels[keep], paths), splits.class_names, "toy")
    assert sequence(lacking).test_counts == [8, 4, 8]
    assert "no test images of 1 of 6 classes: class 2" in caplog.text
    with pytest.raises(ValueError, match=r"task 2 \(classes class 2\) has no test images; give every class some in dataset.root"):
        sequence(lacking, sizes=[1] * 6)


# --------------------------------------------------------------------------------------------------------------------------- batches


def test_keyed_order_and_augmentation() -> None:
    task = sequence()[0]
    first = collect(task.batches("train", stream="fit", epoch=1))
    for batches, is_same in (
        (task.batches("train", stream="fit", epoch=1), True),
        (task.batches("train", stream="fit", epoch=2), False),
        (task.batches("train", stream="subspace", epoch=1), False),
        (sequence(loading=replace(LOADING, seed=1))[0].batches("train", stream="fit", epoch=1), False),
    ):
        again = collect(batches)
        assert torch.equal(first[0], again[0]) is is_same
        assert torch.equal(first[1].sort().values, again[1].sort().values)


def test_every_pass_has_an_order_and_an_augmentation_of_its_own() -> None:
    def views(batches: Batches) -> tuple[Tensor, Tensor]:
        ids = torch.cat([batches.sample_ids(step) for step in range(len(batches))])
        return ids, collect(batches)[0][ids.argsort()]

    task = sequence()[0]
    ids, x = views(task.batches("train", stream="fit", epoch=1))
    for other in (
        task.batches("train", stream="fit", epoch=2),
        task.batches("train", stream="subspace", epoch=1),
        sequence(loading=replace(LOADING, seed=1))[0].batches("train", stream="fit", epoch=1),
    ):
        other_ids, other_x = views(other)
        assert not torch.equal(ids, other_ids), "the order"
        assert (x != other_x).flatten(1).any(1).float().mean() > 0.5, "the augmentation of the same images"


def test_augmentation_belongs_to_the_image_not_to_its_place() -> None:
    """Another batch size, or fewer images around it, leave an image's crop alone."""
    splits = toy_splits()
    first = collect(sequence(splits)[0].batches("train", stream="fit"))[0]
    assert torch.equal(first, collect(sequence(splits, loading=replace(LOADING, batch_size=3))[0].batches("train", stream="fit"))[0])
    fewer = collect(sequence(splits, max_train_per_class=4)[0].batches("train", stream="fit"))[0]
    assert len(fewer) == 8 and _images(fewer) < _images(first)


def test_raw_images_prepared_by_hand_are_those_of_the_batches() -> None:
    """Uneven sizes as well as even ones; what a replay buffer keeps can be augmented afresh or prepared as test images."""
    for size in (8, None):
        transforms = build_transforms("shift_flip" if size else "inflora", 8)
        task = sequence(toy_splits(size=size), transforms=transforms)[0]
        batches = task.batches("test", stream="any")
        expected = torch.cat([x for x, _ in batches])
        images, sizes = task.raw(torch.arange(task.num_train))
        assert images.dtype == torch.uint8 and (sizes is None) == (size == 8)
        assert torch.equal(task.prepare(images, sizes), expected)
        ids = torch.arange(task.num_train)
        once, again, other = (task.prepare(images, sizes, key=key, ids=ids) for key in (1, 1, 2))
        assert torch.equal(once, again) and not torch.equal(once, other)
        few = torch.tensor([2, 0])
        assert torch.equal(task.prepare(*task.raw(few), key=1, ids=few), once[few])


def test_lengths() -> None:
    batches = sequence()[0].batches("train", stream="fit")
    assert (batches.num_images, len(batches)) == (20, 4)
    uneven = sequence(loading=replace(LOADING, batch_size=8))[0].batches("train", stream="fit")
    assert [uneven.global_size(step) for step in range(len(uneven))] == [8, 8, 4] == [len(x) for x, _ in uneven]
    assert [len(x) for x, _ in sequence()[0].test_batches()] == [7, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_goes_on_where_it_stopped_and_reads_nothing_before(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RESIDENT_BYTES", 0)
    splits, read = toy_splits(), []
    batches = sequence(splits, loading=replace(LOADING, num_workers=num_workers))[0].batches("train", stream="fit")
    whole = list(batches)
    fetch = FixedImages.fetch
    monkeypatch.setattr(FixedImages, "fetch", lambda store, rows: read.extend(rows.tolist()) or fetch(store, rows))
    rest = list(batches.starting_at(2))
    assert len(rest) == len(whole) - 2 and len(read) == batches.num_images - 10
    for (x, y), (expected_x, expected_y) in zip(rest, whole[2:], strict=True):
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_limited_test_batches_are_spread_over_the_task() -> None:
    task = sequence()[1]
    x, y = collect(task.test_batches(limit=4))
    assert len(x) == 4 and y.tolist() == [2, 2, 3, 3]
    assert task.test_batches(limit=99).num_images == 8


@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(size: int | None, world_size: int) -> None:
    splits = toy_splits(size=size)
    task = sequence(splits, loading=replace(LOADING, batch_size=19))[0]
    parts = [sequence(splits, loading=replace(LOADING, batch_size=19, rank=rank, world_size=world_size))[0] for rank in range(world_size)]
    passes = [list(task.batches("train", stream="fit")), *(list(part.batches("train", stream="fit")) for part in parts)]
    for (x, y), *shares in zip(*passes, strict=True):
        for rank, (own_x, own_y) in enumerate(shares):
            assert torch.equal(own_x, x[rank::world_size]) and torch.equal(own_y, y[rank::world_size])
    assert passes[2][-1][0].shape == (0, 3, 8, 8), "twenty images, nineteen a batch: the last batch leaves nothing for the second process"


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_know_which_images_they_hold(world_size: int) -> None:
    """Without augmentation an image of a shuffled pass is the one at its position in the task's images, in every process."""
    plain = build_transforms("shift_flip", 8)[1]
    parts = [
        sequence(transforms=(plain, plain), loading=replace(LOADING, batch_size=19, rank=rank, world_size=world_size))[1]
        for rank in range(world_size)
    ]
    images = collect(sequence(transforms=(plain, plain))[1].batches("test", stream="look"))[0]
    found = []
    for part in parts:
        batches = part.batches("train", stream="fit")
        for step, (x, y) in enumerate(batches):
            ids = batches.sample_ids(step)
            assert torch.equal(x, images[ids]) and torch.equal(y, part.train_labels[ids])
            found += ids.tolist()
    assert sorted(found) == list(range(20)) and found != sorted(found)
    in_order = parts[0].batches("test", stream="look")  # batches of seven
    assert [in_order.sample_ids(step).tolist() for step in range(3)] == [
        list(range(start, stop, world_size)) for start, stop in ((0, 7), (7, 14), (14, 20))
    ]
    few = sequence()[1].test_batches(limit=4)
    assert few.sample_ids(0).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_images_that_do_not_fit_come_from_threads_unchanged(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    for limit in (0, 2**30):
        monkeypatch.setattr(tasks, "RESIDENT_BYTES", limit)
        batches = sequence(loading=replace(LOADING, num_workers=num_workers))[0].batches("train", stream="fit")
        assert batches._pool.is_resident is (limit > 0)
        passes.append(list(batches))
    for (x, y), (resident_x, resident_y) in zip(*passes, strict=True):
        assert torch.equal(x, resident_x) and torch.equal(y, resident_y)


def test_leaving_a_pass_early_and_starting_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RESIDENT_BYTES", 0)
    batches = sequence()[0].batches("train", stream="fit")
    first = next(iter(batches))
    assert torch.equal(first[0], next(iter(batches))[0])
    assert len(list(batches)) == 4
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


class TrueCorner:
    """Stands in for a transform: the first pixel of each image plus its draw, and the last one, found through its true size."""

    num_draws = 1

    def __call__(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor | None) -> Tensor:
        assert sizes is not None and uniforms is not None
        last = [image[:, h - 1, w - 1] for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
        return torch.stack([images[:, :, 0, 0] + uniforms, torch.stack(last).float()], dim=2).unsqueeze(3)


@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**26])
def test_images_of_different_sizes_keep_their_order_and_draws(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_splits(size=None)
    transforms = (TrueCorner(), build_transforms("inflora", 8)[1])
    monkeypatch.setattr(tasks, "CHUNK_BYTES", 2**30)
    whole = collect(sequence(splits, transforms=transforms)[0].batches("train", stream="fit"))
    monkeypatch.setattr(tasks, "CHUNK_BYTES", chunk_bytes)
    task = sequence(splits, transforms=transforms)[0]
    chunked = collect(task.batches("train", stream="fit"))
    assert torch.equal(whole[0], chunked[0]) and torch.equal(whole[1], chunked[1])
    # Against the images fetched one at a time.
    rows = [row for row in range(60) if splits.train.labels[row] in task.class_ids]
    corners = {}
    for row in rows:
        image, _ = splits.train.images.fetch(torch.tensor([row]))
        corners[tuple(image[0, :, -1, -1].tolist())] = (image[0, :, 0, 0], int(splits.train.labels[row]))
    for x, y in zip(*chunked, strict=True):
        first, label = corners[tuple(x[:, 1, 0].int().tolist())]
        assert torch.equal(x[:, 0, 0].floor().int(), first.int()) and y == label


def test_test_batch_size_changes_nothing() -> None:
    splits = toy_splits(size=None)
    transforms = build_transforms("inflora", 8)
    loadings = [replace(LOADING, eval_batch_size=size) for size in (1, 3, 64)]
    passes = [collect(sequence(splits, transforms=transforms, loading=loading)[0].test_batches()) for loading in loadings]
    assert all(torch.equal(x, passes[0][0]) and torch.equal(y, passes[0][1]) for x, y in passes)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, None])
def test_gpu_batches_equal_cpu_batches(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = toy_splits(size=size)
    expected = collect(sequence(splits)[0].batches("train", stream="fit"))
    for limit in (0, 2**30):
        monkeypatch.setattr(tasks, "RESIDENT_BYTES", limit)
        x, y = collect(sequence(splits, loading=replace(LOADING, device=torch.device("cuda")))[0].batches("train", stream="fit"))
        assert x.is_cuda and y.is_cuda and torch.equal(y.cpu(), expected[1])
        assert (x.cpu() - expected[0]).abs().max() < 1e-6
