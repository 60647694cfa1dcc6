"""The learning-rate tables, with the published final factors worked out by hand."""

import math

import pytest
from helpers import compose_config
from hydra.utils import instantiate

from inflora import schedule


def factors(epochs: int, lag: int) -> list[float]:
    return [schedule.cosine99(epoch, epochs, lag=lag) for epoch in range(epochs)]


@pytest.mark.parametrize(
    "epochs, lag, last", [(5, 1, 0.3935), (20, 1, 0.0974), (50, 1, 0.0474), (5, 0, 0.0157), (20, 0, 0.0157), (50, 0, 0.0157)]
)
def test_cosine99_ends_where_the_published_code_does(epochs, lag, last):
    found = factors(epochs, lag)
    assert found[-1] == pytest.approx(last, abs=5e-5)
    assert found[0] == 1.0
    assert all(a > b for a, b in zip(found[lag:], found[lag + 1 :], strict=False)), "falls from epoch to epoch, after the lag"


def test_cosine99_of_five_epochs_in_full():
    # cos(99 pi s / 800), s = 0, 1, 2, 3, 4: 22.275 degrees a step
    steps = [math.cos(math.radians(22.275 * s)) for s in range(5)]
    assert factors(5, lag=0) == pytest.approx(steps, abs=1e-12)
    assert factors(5, lag=1) == pytest.approx([1.0, *steps[:4]], abs=1e-12)


@pytest.mark.parametrize("lag", [0, 1])
def test_cosine99_of_one_epoch_is_the_base_rate(lag):
    assert factors(1, lag) == [1.0]


@pytest.mark.parametrize("epochs", [1, 5, 20])
def test_cosine_is_torchs(epochs):
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        assert schedule.cosine(epoch, epochs) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        annealing.step()


def test_step_counts_finished_epochs():
    # "x0.1 at epoch 18": epochs 0..17 run at the base rate
    found = [schedule.step(epoch, 20, milestones=[18], gamma=0.1) for epoch in range(20)]
    assert found == [1.0] * 18 + [0.1] * 2
    twice = [schedule.step(epoch, 6, milestones=[2, 4], gamma=0.5) for epoch in range(6)]
    assert twice == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", ["constant", "cosine", "cosine99", "step"])
def test_every_schedule_of_the_configuration_starts_at_the_base_rate(name):
    function = instantiate(compose_config(f"scheduler={name}").scheduler)
    assert function(0, 20) == 1.0
    assert 0 < function(19, 20) <= 1.0


def test_the_default_schedule_is_the_one_that_was_published():
    cfg = compose_config("optimizer.lr=5e-4")
    assert instantiate(cfg.scheduler)(19, 20) == pytest.approx(0.0974, abs=5e-5)
