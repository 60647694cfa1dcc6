"""Dropout by image: masks that do not know the batch."""

import pytest
import torch

from inflora import seeding
from inflora.parts.dropout import SampleDropout

SEED = 7


def dropped(x: torch.Tensor, ids: torch.Tensor | None, p: float = 0.3) -> torch.Tensor:
    torch.manual_seed(SEED)
    dropout = SampleDropout(p)
    dropout.sample_ids = ids
    return dropout(x)


def test_a_mask_belongs_to_its_image():
    x, ids = torch.rand(6, 5, 40) + 1, torch.tensor([3, 1, 40, 7, 1000, 2])
    whole = dropped(x, ids)
    assert (whole == 0).any() and (whole != 0).any()
    for part in (slice(0, 2), slice(2, 6), [5, 0, 3]):
        torch.testing.assert_close(dropped(x[part], ids[part]), whole[part], rtol=0, atol=0)
    assert not torch.equal(whole[0] == 0, whole[1] == 0)


def test_the_share_of_zeros_is_p_and_the_mean_stays():
    found = dropped(torch.ones(200, 1000, dtype=torch.float64), None)
    kept = found[found != 0]
    assert abs((found == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / found.numel()) ** 0.5
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7))


def test_every_call_and_every_step_has_another_mask():
    torch.manual_seed(SEED)
    dropout, x = SampleDropout(0.5), torch.ones(4, 100)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    seeding.seed_everything(0, "fit", 0, 0, 1)
    assert not torch.equal(dropout(x), first)


def test_nothing_is_dropped_in_evaluation_or_with_p_zero():
    x = torch.rand(3, 4)
    assert dropped(x, None, p=0.0) is x
    assert SampleDropout(0.5).eval()(x) is x


def test_other_images_than_ids_are_refused():
    with pytest.raises(RuntimeError, match="the ids of 2 images for a batch of 3"):
        dropped(torch.ones(3, 4), torch.arange(2))
