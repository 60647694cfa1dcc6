"""Heads that grow by task."""

import pytest
import torch

from inflora.classifier import ClassCounts, TaskHeads

CPU = torch.device("cpu")


def heads_of(*sizes: int) -> TaskHeads:
    heads = TaskHeads(8)
    for size in sizes:
        heads.grow(size, CPU)
    return heads


def test_scores_are_those_of_the_heads_side_by_side():
    heads = heads_of(3, 1, 2)
    features = torch.randn(5, 8)
    scores = heads(features)
    assert scores.shape == (5, 6)
    expected = [features @ head.weight.T + head.bias for head in heads.heads]
    torch.testing.assert_close(scores, torch.cat(expected, 1))
    assert heads(features[:0]).shape == (0, 6)


def test_scores_keep_their_precision_where_the_backbone_has_half():
    heads = heads_of(1, 1)
    with torch.no_grad():
        for head, bias in zip(heads.heads, (8.0, 8.01), strict=True):  # the same number in bfloat16, where the older class would win
            head.weight.zero_()
            head.bias.fill_(bias)
    with torch.autocast("cpu", torch.bfloat16):
        scores = heads(torch.randn(5, 8).bfloat16())
        local, _ = heads_of(2).local(torch.randn(5, 8).bfloat16(), torch.zeros(5, dtype=torch.long))
    assert scores.dtype == local.dtype == torch.float32
    assert scores.argmax(1).tolist() == [1] * 5


def test_a_loss_over_a_single_new_class_trains_its_head_alone():
    heads = heads_of(2, 1, 1)
    features, y = torch.randn(5, 8, requires_grad=True), torch.full((5,), 3)
    scores, labels = heads.local(features, y)
    assert torch.equal(scores, heads(features)) and torch.equal(labels, y)
    torch.nn.functional.cross_entropy(scores, labels).backward()
    assert all(parameter.grad is None for head in heads.heads[:-1] for parameter in head.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads.current.parameters())  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(heads(features), y), features)
    torch.testing.assert_close(features.grad, expected)  # what lies below learns as from all heads


def test_counts_follow_the_growth():
    heads = heads_of()
    assert (len(heads), heads.sizes, heads.num_classes) == (0, [], 0)
    first = heads.grow(3, CPU)
    assert heads.current is first
    second = heads.grow(2, CPU)
    assert heads.current is second
    assert (len(heads), heads.sizes, heads.num_classes) == (2, [3, 2], 5)


def test_growing_leaves_old_heads_alone():
    heads = heads_of(3)
    before = heads.current.weight.clone(), heads.current.bias.clone()
    features = torch.randn(4, 8)
    scores = heads(features)
    heads.grow(2, CPU)
    assert torch.equal(heads.heads[0].weight, before[0]) and torch.equal(heads.heads[0].bias, before[1])
    torch.testing.assert_close(heads(features)[:, :3], scores)


def test_a_new_head_is_drawn_on_the_cpu_whatever_the_device():
    """On the meta device nothing is drawn: what is taken from the CPU's generator was drawn before the head went there."""
    after = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        assert TaskHeads(3).grow(2, torch.device(device)).weight.device.type == device
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_a_new_head_has_torchs_default_initialisation():
    torch.manual_seed(0)
    head = TaskHeads(8).grow(3, CPU)
    torch.manual_seed(0)
    default = torch.nn.Linear(8, 3)
    assert torch.equal(head.weight, default.weight) and torch.equal(head.bias, default.bias)


@pytest.mark.parametrize(
    "old, new, num_kept",
    [([], [3, 2], 0), ([3], [3, 2], 1), ([3, 2], [3], 1), ([3, 2], [3, 2], 2), ([4], [3, 2], 0), ([3, 2], [], 0), ([3, 2], [3, 4], 0)],
)
def test_set_sizes_gives_exactly_these_heads(old, new, num_kept):
    heads = heads_of(*old)
    modules = list(heads.heads)
    heads.set_sizes(new, CPU)
    assert heads.sizes == new
    assert [heads.heads[i] is modules[i] for i in range(num_kept)] == [True] * num_kept


def test_a_state_fits_after_set_sizes():
    trained = heads_of(3, 2)
    fresh = TaskHeads(8)
    fresh.set_sizes(trained.sizes, CPU)
    fresh.load_state_dict(trained.state_dict())
    features = torch.randn(4, 8)
    assert torch.equal(fresh(features), trained(features))


def test_counts_without_heads_follow_the_same_growth():
    counts = ClassCounts(8)
    for size in (3, 2):
        counts.grow(size, CPU)
    assert (len(counts), counts.sizes, counts.num_classes) == (2, [3, 2], 5)
    assert not counts.state_dict()
    counts.set_sizes([4], CPU)
    assert (len(counts), counts.sizes, counts.num_classes) == (1, [4], 4)
    with pytest.raises(AssertionError, match="there are no heads here"):
        counts(torch.zeros(1, 8))
