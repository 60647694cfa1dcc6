"""Whole runs on a CUDA device: the results of a CPU, and no step that waits for the device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import toy
from helpers import METHODS, assert_trained_alike, read_events, run_toy

from inflora.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_report"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, whatever waits for the device is an error."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_as_on_a_cpu(method, tmp_path):
    for device in ("cpu", "cuda"):
        run_toy(tmp_path / device, f"method={method}", f"trainer.device={device}")
    assert_trained_alike(tmp_path / "cpu", tmp_path / "cuda", method)


@pytest.mark.parametrize("precision", ["bf16", "16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_trains(method, precision, tmp_path):
    run_toy(tmp_path, f"method={method}", "trainer.device=cuda", f"trainer.precision={precision}")
    assert np.isfinite([event["loss"] for event in read_events(tmp_path, "epoch")]).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method, tmp_path, monkeypatch):
    honest = Trainer._step

    def watched(*arguments: Any) -> bool:
        with nothing_waits():
            return honest(*arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    run_toy(tmp_path, f"method={method}", "trainer.device=cuda")


@pytest.mark.parametrize("view", ["train", "test"])
def test_no_batch_waits_for_the_device(view):
    task = toy.sequence(batch_size=4, eval_batch_size=4, device=torch.device("cuda"))[0]
    passes = [iter(task.batches(view, stream="fit")) for _ in range(2)]
    for batches in passes:
        next(batches)  # the first batch of a pass brings its labels, and the first of all the images
    with nothing_waits():
        assert len(list(passes[1])) == 2
