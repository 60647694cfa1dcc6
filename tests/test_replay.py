"""The replay buffer: which images it keeps, what it gives back, and that it survives a stop."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from helpers import fingerprint
from learning import Fit, build
from torch import Tensor

from inflora import checkpoint
from inflora.data.cache import VariableImages
from inflora.data.datasets import ImageSet, Splits
from inflora.data.tasks import Loading, TaskSequence, similar_sizes
from inflora.data.transforms import build_transforms
from inflora.methods.er import ER
from inflora.parts.replay import ReplayBuffer
from inflora.seeding import seed_everything


def stream(labels: Tensor, index: int = 0) -> Any:
    """What a buffer asks of a task: images of one pixel that show their position."""
    pixels = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return SimpleNamespace(index=index, train_labels=labels, raw=lambda positions: (pixels[positions], None))


def buffer(seed: int = 0, **changes: Any) -> ReplayBuffer:
    torch.manual_seed(seed)
    return ReplayBuffer(**{"selection": "balanced", "buffer_size": None, "per_class": 3} | changes)


def positions(store: ReplayBuffer) -> list[int]:
    return [int(image[0, 0, 0]) for image in store.images]


# ---- which images stay -------------------------------------------------------------------------------------------------------------


def test_every_image_of_a_stream_is_alike_likely_to_be_in_a_reservoir():
    """At every moment of the stream, whatever the order and in whatever batches the images come."""
    task, runs, size = stream(torch.zeros(24, dtype=torch.int64)), 1500, 6
    counts = {12: torch.zeros(24), 24: torch.zeros(24)}
    for run in range(runs):
        store = buffer(run, selection="reservoir", buffer_size=size, per_class=None)
        for start in range(0, 24, 4):
            store.offer(task, torch.arange(start, start + 4), num_classes=1)
            if start + 4 in counts:
                counts[start + 4][positions(store)] += 1
    for seen, count in counts.items():
        expected = size / seen
        assert not count[seen:].any()
        error = (runs * expected * (1 - expected)) ** 0.5
        assert (count[:seen] / runs - expected).abs().max() < 4 * error / runs, "four standard deviations"


def test_every_image_of_a_class_is_alike_likely_to_be_in_a_balanced_buffer():
    task, runs = stream(torch.tensor([0] * 5 + [1] * 20)), 1500
    count = torch.zeros(25)
    for run in range(runs):
        store = buffer(run)
        for part in torch.randperm(25).split(7):
            store.offer(task, part, num_classes=2)
        count[positions(store)] += 1
    assert (count[:5] / runs - 3 / 5).abs().max() < 0.06
    assert (count[5:] / runs - 3 / 20).abs().max() < 0.04


@pytest.mark.parametrize("selection", ["balanced", "reservoir"])
def test_neither_order_nor_batches_nor_epochs_change_the_content(selection):
    arguments = {"selection": selection, "buffer_size": 8, "per_class": None}
    task = stream(torch.arange(40) % 4)
    once = buffer(**arguments)
    once.offer(task, torch.arange(40), num_classes=4)
    often = buffer(**arguments)
    for epoch in range(3):
        for part in torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).split(7):
            often.offer(task, part, num_classes=4)
    assert positions(often) == positions(once) and len(once) == 8
    assert torch.equal(often.labels, once.labels) and torch.equal(often.ids, once.ids)


def test_a_balanced_buffer_is_balanced():
    store = buffer(per_class=3)
    store.offer(stream(torch.tensor([0] * 10 + [1] * 2 + [2] * 30)), torch.arange(42), num_classes=3)
    assert store.labels.bincount().tolist() == [3, 2, 3], "all of a class with fewer images"


def test_classes_share_a_bounded_buffer_and_give_up_their_last_comers():
    store = buffer(buffer_size=12, per_class=None)
    kept: list[set[int]] = []
    for index in range(3):
        store.offer(stream(torch.tensor([2 * index, 2 * index + 1] * 10), index), torch.arange(20), num_classes=2 * index + 2)
        assert set(store.labels.bincount().tolist()) == {[6, 3, 2][index]}
        kept.append(set(store.ids.tolist()))
        assert (store.priorities[1:] >= store.priorities[:-1])[store.labels[1:] == store.labels[:-1]].all()
    assert {i for i in kept[2] if i < 20} < {i for i in kept[1] if i < 20} < kept[0], "what stays was there"


def test_no_class_is_left_out_where_there_are_more_classes_than_images():
    store = buffer(buffer_size=3, per_class=None)
    store.offer(stream(torch.arange(5).repeat(4)), torch.arange(20), num_classes=5)
    assert store.labels.tolist() == [0, 1, 2, 3, 4]


def test_the_smaller_bound_counts():
    assert buffer(buffer_size=100, per_class=7).quota(10) == 7
    assert buffer(buffer_size=100, per_class=70).quota(10) == 10


def test_images_of_different_tasks_are_different_images():
    store = buffer(per_class=100)
    for index in range(2):
        store.offer(stream(torch.full((4,), index), index), torch.arange(4), num_classes=2)
    assert len(store) == len(store.ids.unique()) == 8


def test_given_priorities_decide():
    store = buffer(per_class=2)
    store.offer(stream(torch.zeros(5, dtype=torch.int64)), torch.tensor([4, 0, 3]), num_classes=1, priorities=torch.tensor([1, 2, 0]))
    assert positions(store) == [3, 4]


# ---- what it holds -----------------------------------------------------------------------------------------------------------------


def test_a_buffer_holds_training_images_with_their_labels_and_no_test_image():
    method = build(["method=er", "method.per_class=4"])
    tasks = toy.sequence()
    splits = toy.tiny(Path())
    train, test = splits.train.images.fetch(torch.arange(36))[0], splits.test.images.fetch(torch.arange(24))[0]
    for task in tasks:
        Fit(method, task).begin().train()
    assert isinstance(method, ER) and len(method.buffer) == 24
    for image, label in zip(method.buffer.images, method.buffer.labels, strict=True):
        assert image.dtype == torch.uint8
        (row,) = (train == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert splits.train.labels[row] == label
        assert not (test == image).flatten(1).all(1).any()
    found = method.diagnostics()
    assert found == {"buffer_images": 24, "buffer_megabytes": 24 * 3 * 16 * 16 / 1e6}


def uneven(world_size: int = 1, rank: int = 0) -> TaskSequence:
    """A task sequence over images of many sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, 40, (12, 2), generator=generator)
    images = [torch.randint(256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes.tolist()]
    store = VariableImages(torch.cat([image.flatten() for image in images]).numpy(), sizes)
    image_set = ImageSet(store, torch.arange(2).repeat_interleave(6), [str(row) for row in range(12)])
    return TaskSequence(
        Splits(image_set, image_set, ["a", "b"], "uneven"),
        class_order=[0, 1],
        task_sizes=[1, 1],
        transforms=build_transforms("inflora", 16, [0.5] * 3, [0.5] * 3),
        loading=Loading(torch.device("cpu"), 4, 16, 0, rank=rank, world_size=world_size),
    )


def test_images_of_uneven_sizes_come_back_as_the_batches_have_them(monkeypatch):
    monkeypatch.setattr("inflora.data.tasks.CHUNK_BYTES", 12_000)  # several chunks
    store = buffer(per_class=6)
    tasks = uneven()
    for task in tasks:
        store.offer(task, torch.arange(6), num_classes=2)
    rows = torch.tensor([7, 0, 11, 3, 4, 4])
    assert len(similar_sizes(torch.tensor([store.images[row].shape[1:] for row in rows.tolist()]))) > 1
    x = torch.cat([x for task in tasks for x, _ in task.batches("test", stream="any")])
    image_of = (store.ids >> 32) * 6 + (store.ids & 0xFFFF)
    assert torch.equal(store.prepare(tasks[1], rows), x[image_of[rows]])
    augmented = store.prepare(tasks[1], rows, key=5, ids=torch.arange(6))
    assert augmented.shape == (6, 3, 16, 16) and not torch.equal(augmented[4], augmented[5]), "one image, drawn twice"
    assert torch.equal(store.prepare(tasks[1], rows[3:5], key=5, ids=torch.arange(3, 5)), augmented[3:5])


@pytest.mark.parametrize("scored", [False, True])
def test_a_saved_buffer_goes_on_as_if_nothing_had_happened(scored, tmp_path):
    task = uneven()[0]
    scores = {"scores": torch.randn(3, 1)} if scored else {}
    store = buffer(per_class=4)
    store.offer(task, torch.tensor([0, 3, 5]), num_classes=1, **scores)
    checkpoint.save(tmp_path / "buffer.safetensors", store.state_dict())
    other = buffer(seed=1)
    other.offer(task, torch.arange(2), num_classes=1)
    other.per_class = 4
    other.load_state_dict(checkpoint.load(tmp_path / "buffer.safetensors"))
    for one in (store, other):
        one.offer(task, torch.tensor([1, 2, 4]), num_classes=1, **scores)
    assert fingerprint(other.state_dict()) == fingerprint(store.state_dict())
    assert len({image.shape for image in store.images}) > 1


def test_an_empty_buffer_can_be_saved(tmp_path):
    checkpoint.save(tmp_path / "buffer.safetensors", buffer().state_dict())
    other = buffer(seed=1)
    other.load_state_dict(checkpoint.load(tmp_path / "buffer.safetensors"))
    assert len(other) == 0 and other.key == buffer().key


# ---- scores ------------------------------------------------------------------------------------------------------------------------


def test_scores_stay_with_their_images_while_classes_are_added_and_images_leave():
    store = buffer(selection="reservoir", buffer_size=5, per_class=None)
    truth = {}
    for index, width in enumerate((2, 3, 5)):
        scores = torch.randn(8, width)
        store.offer(stream(torch.full((8,), index), index), torch.arange(8), num_classes=width, scores=scores)
        truth |= {(index << 32) + row: scores[row] for row in range(8)}
        assert len(store) == 5 and store.scores.shape == (5, width)
        for image, row, known in zip(store.ids.tolist(), store.scores, store.num_known.tolist(), strict=True):
            assert known == len(truth[image])
            assert torch.equal(row[:known], truth[image]) and not row[known:].any()


def test_scores_of_images_in_the_buffer_are_replaced_and_of_no_other():
    store = buffer(per_class=3)
    task = stream(torch.zeros(6, dtype=torch.int64))
    store.offer(task, torch.arange(6), num_classes=1, scores=torch.zeros(6, 1))
    inside, outside = store.ids[1].item(), next(i for i in range(6) if i not in store.ids.tolist())
    store.refresh(task, torch.tensor([outside, inside]), torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    assert store.scores.tolist() == [[0, 0], [2, 3], [0, 0]] and store.num_known.tolist() == [1, 2, 1]
    store.refresh(task, torch.tensor([outside]), torch.ones(1, 2))
    assert store.scores.tolist() == [[0, 0], [2, 3], [0, 0]]


# ---- drawing -----------------------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_belong_to_the_image():
    store = buffer(per_class=4)
    store.offer(stream(torch.zeros(9, dtype=torch.int64)), torch.arange(9), num_classes=1)
    rows = store.draw(7, torch.arange(4000), 2).view(-1, 2)
    assert (rows.flatten().bincount(minlength=4) / 8000 - 1 / 4).abs().max() < 0.02
    assert torch.equal(store.draw(7, torch.arange(1, 4000, 2), 2).view(-1, 2), rows[1::2])
    assert not torch.equal(store.draw(8, torch.arange(4000), 2), rows.flatten())


@pytest.mark.parametrize("name", ["er", "derpp", "icarl"])
def test_two_processes_replay_what_one_does(name, monkeypatch):
    """The gradients of two processes, weighted as the trainer does, add up to those of one; afterwards their buffers are the same."""
    whole = build([f"method={name}"])
    tasks = toy.sequence()
    Fit(whole, tasks[0]).begin().train().end()
    fit = Fit(whole, tasks[1]).begin()
    state = whole.state_dict()
    batches = tasks[1].batches("train", stream="fit")
    x, y = next(iter(batches))
    ids = batches.sample_ids(0)

    def step(method: Any, part: slice) -> Tensor:
        method.task, method.sample_ids = tasks[1], ids[part]
        method.requires_grad_(True)
        method.zero_grad()
        seed_everything(0, "epoch")
        method.begin_epoch(0)
        seed_everything(0, "step")
        (method.loss(x[part], y[part]) * (len(ids[part]) / len(ids))).backward()
        return torch.cat([p.grad.flatten() for group in method.param_groups() for p in group["params"]])

    halves = []
    for rank in range(2):
        half = build([f"method={name}"], seed=1)
        half.load_state_dict(state)
        halves.append((half, step(half, slice(rank, None, 2))))
    expected = step(fit.method, slice(None))
    torch.testing.assert_close(sum(gradient for _, gradient in halves), expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    if name == "icarl":
        return
    own = {id(method): getattr(method, "_scores", None) for method, _ in halves}
    parts = [ids[0::2], ids[1::2]]
    monkeypatch.setattr("inflora.parts.replay.num_processes", lambda: 2)
    monkeypatch.setattr("inflora.parts.replay.gather_over_processes", lambda _: torch.cat(parts))
    monkeypatch.setattr("inflora.methods.derpp.gather_over_processes", lambda _: torch.cat(list(own.values())))
    for method, _ in halves:
        method.after_step()
    monkeypatch.undo()
    whole.after_step()
    for method, _ in halves:
        found, wanted = method.buffer.state_dict(), whole.buffer.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in ("pixels", "labels", "ids", "priorities", "num_known"))
        torch.testing.assert_close(found["scores"], wanted["scores"])


# ---- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"selection": "ring"}, "method.selection=ring is not known; choose balanced or reservoir"),
        ({"per_class": 0}, "method.per_class=0 is below 1; choose a number of images, or null for no bound"),
        ({"buffer_size": -1}, "method.buffer_size=-1 is below 1"),
        ({"per_class": None}, "method.buffer_size and method.per_class are both null"),
        ({"selection": "reservoir", "per_class": None}, "method.selection=reservoir needs method.buffer_size, a number of images"),
        ({"selection": "reservoir", "buffer_size": 9}, "and method.per_class=null"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        buffer(**arguments)


def test_a_process_without_images_of_a_batch_takes_part_in_what_follows_a_step():
    loading = Loading(torch.device("cpu"), 1, 16, 0)
    assert replace(loading, rank=1, world_size=2).world_size == 2
    method = build(["method=derpp"])
    fit = Fit(method, toy.sequence()[0]).begin()
    method.begin_epoch(0)
    method.sample_ids = torch.zeros(0, dtype=torch.int64)
    method.after_step()
    assert len(method.buffer) == 0 and fit.task.index == 0
