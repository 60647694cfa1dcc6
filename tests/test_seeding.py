"""Streams must be reproducible, told apart by every part of their key, and statistically clean between neighbouring keys."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from inflora.seeding import draw_, generator, seed_everything, stream_seed, uniform


def test_known_values():
    # A change here changes the augmentation and the order of every run, also of the runs that are to be resumed.
    key = stream_seed(0, "tasks:order", 1, 2)
    assert key == 3838755741616288665
    assert (uniform(key, torch.tensor([0, 1, 49_999]), 2) * 2**24).tolist() == [[6866358, 7911904], [14089566, 4766594], [7603132, 3635490]]


def test_every_part_of_the_key_matters():
    keys = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", 0, 1),
        (0, "a", 1, 0),
        (0, "a", 0, 0),
        (0, "a:1"),
        (10, "a"),
        (1, "0a"),
    ]
    seeds = [stream_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_one_stream_agree_and_of_others_differ():
    first, again, other = (torch.rand(8, generator=generator(0, "init", task)) for task in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generator_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "init"))
    assert torch.equal(before, torch.get_rng_state())


def test_seed_everything_reaches_python_numpy_and_torch():
    draws = []
    for seed in (0, 0, 1):
        seed_everything(seed, "epoch", 2)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert all(x != y for x, y in zip(draws[0], draws[2], strict=True))


def test_a_weight_is_drawn_as_torch_draws_it_on_the_cpu():
    weight, expected = torch.nn.Parameter(torch.zeros(3, 5)), torch.empty(3, 5)
    torch.manual_seed(0)
    draw_(weight, torch.nn.init.kaiming_uniform_, nonlinearity="linear")
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(expected, nonlinearity="linear")
    assert torch.equal(weight, expected) and torch.equal(after, torch.rand(1))
    torch.manual_seed(0)
    draw_(torch.empty(3, 5, device="meta"), torch.nn.init.kaiming_uniform_)
    assert torch.equal(after, torch.rand(1))


def test_uniform_depends_on_sample_and_position_only():
    key = stream_seed(3, "augment")
    together = uniform(key, torch.tensor([7, 2, 900]), 5)
    assert together.dtype == torch.float32
    assert torch.equal(uniform(key, torch.tensor([900, 7], dtype=torch.int32), 5), together[[2, 0]])
    assert torch.equal(uniform(key, torch.tensor([2]), 3), together[1:2, :3])
    assert uniform(key, torch.tensor([], dtype=torch.long), 5).shape == (0, 5)
    assert uniform(key, torch.tensor([1, 2]), 0).shape == (2, 0)


def neighbours() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of sets of draws that differ by one step in one part of the key; (N,) each."""
    ids = torch.arange(8_000)
    here = uniform(stream_seed(0, "augment", 0, 0), ids, 8)
    pairs = {
        "next id": (here[:-1], here[1:]),
        "next position": (here[:, :-1], here[:, 1:]),
        "next id and position": (here[:-1, :-1], here[1:, 1:]),
        "previous position of next id": (here[:-1, 1:], here[1:, :-1]),
        "id 1024 later": (here[:-1024], here[1024:]),
        "next epoch": (here, uniform(stream_seed(0, "augment", 0, 1), ids, 8)),
        "next seed": (here, uniform(stream_seed(1, "augment", 0, 0), ids, 8)),
    }
    key = stream_seed(0, "augment", 0, 0)
    pairs |= {f"key with bit {bit} flipped": (here, uniform(key ^ (1 << bit), ids, 8)) for bit in (0, 1, 5, 31, 32, 62)}
    pairs["key plus one"] = (here, uniform(key + 1, ids, 8))
    return {name: (x.flatten(), y.flatten()) for name, (x, y) in pairs.items()}


PAIRS = neighbours()


def chi_square_z(counts: Tensor) -> float:
    """The chi-square statistic of equally likely cells, standardised: about a standard normal number."""
    expected = counts.sum() / len(counts)
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("name", PAIRS)
def test_neighbours_are_independent(name: str):
    x, y = (v.double() for v in PAIRS[name])
    for f, g in itertools.product([lambda v: v - 0.5, lambda v: (v - 0.5) ** 2 - 1 / 12, lambda v: (v < 0.5).double() - 0.5], repeat=2):
        a, b = f(x), g(y)
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation) * len(x) ** 0.5 < 4.5
    cells = (x * 16).long() * 16 + (y * 16).long()  # a pair is uniform on the square, not just uncorrelated
    assert abs(chi_square_z(torch.bincount(cells, minlength=256).double())) < 4.5


@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_leading_and_trailing_bits_are_uniform(bits: int):
    draws = uniform(stream_seed(0, "augment", 4, 7), torch.arange(50_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    whole = (draws.double() * 2**24).long()
    for cells in (whole >> (24 - bits), whole & (2**bits - 1)):
        for column in (cells.flatten(), cells[:, 0], cells[:, 3]):
            assert abs(chi_square_z(torch.bincount(column, minlength=2**bits).double())) < 4.5


def test_mean_over_keys_is_uniform_for_a_fixed_sample():
    # The same sample over many epochs: what decides how often an image is flipped.
    draws = torch.cat([uniform(stream_seed(0, "augment", 0, epoch), torch.arange(16), 4) for epoch in range(2_000)]).view(2_000, -1)
    z = (draws.double().mean(0) - 0.5) * (12 * 2_000) ** 0.5
    assert z.abs().max() < 4.5
    assert 0.7 < z.std() < 1.3


@pytest.mark.gpu
def test_devices_agree():
    ids = torch.arange(1000)
    assert torch.equal(uniform(5, ids.cuda(), 7).cpu(), uniform(5, ids, 7))
