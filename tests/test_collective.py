"""Sums and errors over processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from inflora.checkpoint import CheckpointError
from inflora.parts import collective
from inflora.parts.collective import failing_together, from_first, gather_objects, gather_over_processes, num_processes, sum_over_processes


def test_one_process_alone():
    assert num_processes() == 1
    tensor = torch.tensor([1.0, 2.0])
    assert sum_over_processes(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert gather_over_processes(tensor) is tensor
    assert gather_objects("anything") == ["anything"] and from_first("anything") == "anything"
    with failing_together():
        done = True
    assert done
    with pytest.raises(KeyError, match="mine"), failing_together():
        raise KeyError("mine")


def test_an_error_of_another_process_is_raised_here_too(monkeypatch):
    monkeypatch.setattr(collective, "num_processes", lambda: 3)
    gathered = []

    def gather(errors: list[Exception | None], own: Exception | None) -> None:
        gathered.append(own)
        errors[:] = [own, None, CheckpointError("the disk is full")]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(CheckpointError, match="the disk is full"), failing_together():
        pass
    with pytest.raises(ValueError, match="mine"), failing_together():
        raise ValueError("mine")
    assert [type(error) for error in gathered] == [type(None), ValueError]


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    torch.multiprocessing.spawn(_meet, (tmp_path,), nprocs=2)
    assert [(tmp_path / name).read_text() for name in "01"] == ["3.0, [0, 1, 1], [0, 1], 0 in CheckpointError: the first disk is full"] * 2


def _meet(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    total = sum_over_processes(torch.tensor(rank + 1.0)).item()
    rows = gather_over_processes(torch.full((rank + 1,), rank)).tolist()
    objects, first = gather_objects(rank), from_first(rank)
    try:
        with failing_together():
            if rank == 0:
                raise CheckpointError("the first disk is full")
    except CheckpointError as error:
        (folder / str(rank)).write_text(f"{total}, {rows}, {objects}, {first} in {type(error).__name__}: {error}")
    dist.destroy_process_group()
