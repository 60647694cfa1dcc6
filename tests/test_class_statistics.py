"""Class statistics against direct formulas, however the features come in."""

import pytest
import torch
import toy
from torch import Tensor

from inflora.parts.class_statistics import RIDGE, ClassStatistics, cholesky

DIM = 6


def features(num_classes: int, sizes: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Far from the origin, where the difference of large sums would show."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_classes, DIM, DIM, generator=draw)
    parts = [torch.randn(size, DIM, generator=draw) @ mix[c] + 30 * (c + 1) for c, size in enumerate(sizes)]
    return torch.cat(parts), torch.arange(num_classes).repeat_interleave(torch.tensor(sizes))


def fitted(kind: str, x: Tensor, y: Tensor, *, tasks: tuple[int, ...] = (3,), batch: int = 7, order: Tensor | None = None):
    statistics = ClassStatistics(DIM, covariance=kind)  # type: ignore[arg-type]
    order = torch.arange(len(x)) if order is None else order
    for size in tasks:
        start = len(statistics)
        own = order[(y[order] >= start) & (y[order] < start + size)]
        statistics.add_features(zip(x[own].split(batch), y[own].split(batch), strict=True), size)
    return statistics


@pytest.mark.parametrize("kind", ["full", "shared", "diag"])
@pytest.mark.parametrize("tasks", [(3,), (1, 2), (2, 1)])
def test_moments_are_those_of_a_direct_computation(kind, tasks):
    x, y = features(3, [9, 20, 14])
    found = fitted(kind, x, y, tasks=tasks)
    own = [x[y == c].double() for c in range(3)]
    torch.testing.assert_close(found.means, torch.stack([part.mean(0) for part in own]).float())
    assert found.counts.tolist() == [9, 20, 14]
    direct = [part.T.cov() for part in own]
    pooled = torch.stack([(len(part) - 1) * cov for part, cov in zip(own, direct, strict=True)]).sum(0) / (43 - 3)
    for c in range(3):
        expected = pooled if kind == "shared" else direct[c].diagonal() if kind == "diag" else direct[c]
        torch.testing.assert_close(found.covariance(c), expected.float())


@pytest.mark.parametrize("kind", ["full", "shared", "diag"])
def test_batches_and_their_order_do_not_matter(kind):
    x, y = features(3, [9, 20, 14])
    found = fitted(kind, x, y)
    for batch, seed in ((1, 0), (43, 1), (10, 2)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        other = fitted(kind, x, y, batch=batch, order=order)
        torch.testing.assert_close(other.means, found.means, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.covariances, found.covariances, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "shared", "diag"])
def test_one_image_none_at_all_and_fewer_than_dimensions(kind):
    x, y = features(3, [1, 0, 4])
    found = fitted(kind, x, y)
    assert found.counts.tolist() == [1, 0, 4]
    assert found.covariances.isfinite().all()
    assert torch.equal(found.means[0], x[0])
    if kind != "shared":
        assert not found.covariances[:2].any()
    for label in (0, 2):
        assert found.sample(label, 3).isfinite().all()


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_a_class_of_one_image_is_drawn_with_a_variance_of_a_ten_thousandth(kind):
    x, y = features(2, [1, 3])
    drawn = fitted(kind, x, y, tasks=(2,)).sample(0, 20_000, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(drawn.var(0), torch.full((DIM,), 1e-4, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", ["full", "shared", "diag"])
def test_samples_have_the_moments_asked_for(kind):
    x, y = features(2, [40, 60])
    found = fitted(kind, x, y, tasks=(2,))
    for label in range(2):
        drawn = found.sample(label, 200_000, scale=0.9, generator=torch.Generator().manual_seed(1)).double()
        covariance = found.covariance(label).double()
        expected = (covariance.diag() if kind == "diag" else covariance) + RIDGE * torch.eye(DIM)
        deviations = expected.diagonal().sqrt()
        assert ((drawn.mean(0) - 0.9 * found.means[label]) / deviations).abs().max() < 0.02
        assert ((drawn.T.cov() - expected) / torch.outer(deviations, deviations)).abs().max() < 0.02


def test_samples_follow_the_newest_shared_covariance():
    x, y = features(2, [40, 60])
    found = fitted("shared", x, y, tasks=(1,))
    found.sample(0, 1)  # which remembers a factor
    found.add_features([(10 * x[y == 1], y[y == 1])], 1)
    drawn = found.sample(0, 100_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.T.cov(), found.covariance(0), rtol=0.05, atol=0.05 * found.covariance(0).max().item())


def test_the_same_draws_from_the_global_generator():
    x, y = features(2, [40, 60])
    found = fitted("full", x, y, tasks=(2,))
    torch.manual_seed(5)
    first = found.sample(1, 4)
    torch.manual_seed(5)
    assert torch.equal(found.sample(1, 4), first)
    assert torch.equal(found.sample(1, 4, generator=torch.Generator().manual_seed(5)), first)


def test_a_factor_of_what_has_none():
    identity = torch.eye(3, dtype=torch.float64)
    matrix = torch.diag(torch.tensor([1.0, 0.0, -5e-4], dtype=torch.float64))
    factor = cholesky(matrix, 1e-4)
    torch.testing.assert_close(factor @ factor.T, matrix + 8e-4 * identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(cholesky(2 * identity, 1e-4) ** 2, (2 + 1e-4) * identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "shared", "diag"])
def test_a_fresh_and_a_used_instance_take_over(kind):
    x, y = features(3, [9, 20, 14])
    found = fitted(kind, x, y)
    for other in (ClassStatistics(DIM, covariance=kind), fitted(kind, 2 * x, y, tasks=(1,))):
        if len(other):
            other.sample(0, 1)
        other.load_state_dict(found.state_dict())
        assert len(other) == 3
        for label in range(3):
            draws = [one.sample(label, 5, generator=torch.Generator().manual_seed(0)) for one in (found, other)]
            assert torch.equal(*draws)


def test_a_task_is_seen_through_the_test_transform():
    task = toy.sequence()[0]
    vit = toy.toy_vit().eval()
    found = ClassStatistics(toy.EMBED_DIM, covariance="full")
    found.add(task, vit)
    x, y = zip(*task.batches("test", stream="anything"), strict=True)
    with torch.no_grad():
        direct = vit(torch.cat(x))
    for label in range(task.num_classes):
        torch.testing.assert_close(found.means[label], direct[torch.cat(y) == label].mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.covariance(label), direct[torch.cat(y) == label].T.cov(), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match=r"method.covariance=half is not known; choose one of full, shared, diag"):
        ClassStatistics(DIM, covariance="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a feature of this task's images is not finite; lower optimizer.lr"):
        ClassStatistics(DIM, covariance="diag").add_features([(torch.full((2, DIM), torch.nan), torch.zeros(2).long())], 1)
