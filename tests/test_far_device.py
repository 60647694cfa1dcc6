"""What a GPU would refuse, or wait for, by a device with the same rules: see far_device.py."""

from typing import Any

import numpy as np
import pytest
import torch
import toy
from far_device import FAR, FarTensor, far_device
from helpers import METHODS, assert_trained_alike, read_events, results, run_toy
from torch import Tensor

from inflora.data import tasks
from inflora.data.cache import VariableImages
from inflora.data.transforms import build_transforms
from inflora.device import Arriving, to_device
from inflora.metrics import TestCounter
from inflora.trainer import Trainer, sum_gradients

pytestmark = pytest.mark.usefixtures("no_report")


# ---- the device itself -------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_cpu():
    with far_device() as notes:
        weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).to(FAR))
        loss = (weight[:, 1:] * torch.full((2, 2), 2.0, device=FAR)).square().sum()
        loss.backward()
        assert isinstance(weight.grad, FarTensor) and weight.grad.device == FAR
        notes.watching = False
        assert weight.grad.tolist() == [[0, 8, 16], [0, 32, 40]] and loss.item() == 4 * (1 + 4 + 16 + 25)


def test_a_module_keeps_its_parameters_when_it_moves():
    with far_device():
        module = torch.nn.Linear(2, 2)
        weight = module.weight
        module.to(FAR)
        assert module.weight is weight and isinstance(weight, FarTensor)
        weight.data = torch.zeros(2, 2, device=FAR)
        assert not weight.any()


def test_tensors_of_two_devices_do_not_mix():
    with far_device():
        there, here = torch.zeros(3, device=FAR), torch.zeros(3)
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="on two devices"):
                mixed()
        assert (there + torch.tensor(1.0)).shape == (3,)  # a single number may be anywhere


WAITS: dict[str, Any] = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "copy to the host": lambda x: x.cpu(),
    "copy from ordinary memory": lambda x: torch.zeros(2).to(FAR),
    "index from ordinary memory": lambda x: x[torch.tensor([0, 2])],
    "index by a mask": lambda x: x[x > 1],
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_noted(what):
    with far_device() as notes:
        x = torch.arange(3.0, device=FAR)
        notes.waits.clear()
        WAITS[what](x)
        assert len(notes.waits) == 1 and notes.waits[0].startswith(what)


def test_what_does_not_wait_is_not_noted():
    with far_device() as notes:
        x = to_device(torch.arange(4.0), FAR)
        x[to_device(torch.tensor([3, 1]), FAR)] += 1
        x[to_device(torch.arange(4)[::3], FAR)] += 1  # with gaps in host memory
        x[x > 3] = 0
        x.zero_().fill_(torch.tensor(2.0))
        assert not notes.waits


def test_a_copy_on_its_way_to_the_host_has_to_be_waited_for():
    with far_device() as notes:
        x = to_device(torch.arange(3.0), FAR)
        assert (x.to("cpu", non_blocking=True) == -1).all(), "not there yet"
        arriving = Arriving(x)
        x += 1
        assert arriving.get().tolist() == [0, 1, 2]
        assert not notes.waits


def test_numbers_drawn_there_are_noted():
    with far_device() as notes:
        torch.zeros(3).uniform_()
        assert not notes.draws
        torch.rand(3, device=FAR)
        assert len(notes.draws) == 1


# ---- runs --------------------------------------------------------------------------------------------------------------------------


ONCE = (":_resident", ":metrics")
"""Functions that wait, and keep what they find: the images on the device, FeCAM's metric of each class."""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_mixes_no_devices_and_waits_neither_in_steps_nor_in_tests(method, tmp_path, monkeypatch):
    run_toy(tmp_path / "here", f"method={method}")
    honest = Trainer._step
    with far_device() as notes:
        notes.watching = False

        def watched(*arguments: Any) -> bool:
            notes.watching = True
            try:
                return honest(*arguments)
            finally:
                notes.watching = False

        class Watching(TestCounter):
            """Watches from the beginning of a test to where the rates are asked for."""

            def __init__(self, class_to_task: Tensor) -> None:
                super().__init__(class_to_task)
                notes.watching = True

            def rates(self) -> Any:
                notes.watching = False
                return super().rates()

        monkeypatch.setattr(Trainer, "_step", watched)
        monkeypatch.setattr("inflora.trainer.TestCounter", Watching)
        run_toy(tmp_path / "there", f"method={method}")
    assert [note for note in notes.waits if not any(name in note for name in ONCE)] == []
    assert notes.draws == []
    assert_trained_alike(tmp_path / "here", tmp_path / "there", method)
    first_losses = [[event["loss"] for event in read_events(tmp_path / where, "epoch")[:2]] for where in ("here", "there")]
    np.testing.assert_allclose(*first_losses, rtol=1e-5)  # of the first task


def uneven(pixels: Tensor) -> VariableImages:
    """The images, some of them without their last rows."""
    images = [image[:, : image.shape[1] - row % 3] for row, image in enumerate(pixels)]
    sizes = torch.tensor([image.shape[1:] for image in images])
    return VariableImages(torch.cat([image.flatten() for image in images]).numpy(), sizes)


@pytest.mark.parametrize("transform", ["shift_flip", "inflora", "pilot"])
@pytest.mark.parametrize("images", ["on the device", "in host memory", "of different sizes"])
@pytest.mark.parametrize("view", ["train", "test"])
def test_no_batch_waits(view, images, transform, monkeypatch):
    monkeypatch.setattr(toy, "build_transforms", lambda name, *rest: build_transforms(transform, *rest))
    monkeypatch.setattr(tasks, "map_ahead", lambda load, steps, *_, **__: map(load, steps))  # other threads do not see the device
    if images == "in host memory":
        monkeypatch.setattr(tasks, "RESIDENT_BYTES", 0)
    if images == "of different sizes":
        monkeypatch.setattr(toy, "FixedImages", uneven)
    with far_device() as notes:
        task = toy.sequence(device=FAR, batch_size=4, eval_batch_size=4)[0]
        passes = [iter(task.batches(view, stream="fit")) for _ in range(2)]
        for batches in passes:
            next(batches)  # the first batch of a pass brings its labels, and the first of all the images
        notes.waits.clear()
        assert [len(x) for x, _ in passes[1]] == [4, 4]
    assert notes.waits == [] and notes.draws == []


@pytest.mark.parametrize("lacks_gradient", [False, True])
def test_processes_add_their_gradients_without_waiting(lacks_gradient, monkeypatch):
    """What another process asks for comes with them. Only one that lacks a gradient waits, to hear whether another has it."""
    with far_device() as notes:
        parameters = [torch.nn.Parameter(to_device(torch.zeros(2), FAR)) for _ in range(2)]
        for parameter in parameters[lacks_gradient:]:
            parameter.grad = to_device(torch.ones(2), FAR)
        notes.waits.clear()
        other = to_device(torch.tensor([1.0, 1, 2, 2, 1, 1, 1]), FAR)
        monkeypatch.setattr("inflora.trainer.sum_over_processes", lambda own: own.add_(other))
        vote = Arriving(sum_gradients(parameters, False))
        assert len(notes.waits) == lacks_gradient
        assert vote.get().item() is True
        gradients: Any = [parameter.grad for parameter in parameters]
        assert [gradient.tolist() for gradient in gradients] == [[1.0 + (not lacks_gradient)] * 2, [3.0, 3.0]]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on(method, tmp_path, monkeypatch):
    saved: list[str] = []
    stop_after = -1

    def stopping(self: Trainer, method: Any, position: Any, tag: str, **options: Any) -> None:
        honest(self, method, position, tag, **options)
        saved.append(tag)
        if len(saved) == stop_after:
            raise KeyboardInterrupt

    honest = Trainer._save
    monkeypatch.setattr(Trainer, "_save", stopping)
    with far_device() as notes:
        notes.watching = False
        run_toy(tmp_path / "whole", f"method={method}")
        whole, stop_after = saved.copy(), len(saved) // 2
        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            run_toy(tmp_path / "stopped", f"method={method}")
        run_toy(tmp_path / "stopped", f"method={method}")
    assert saved == whole
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
