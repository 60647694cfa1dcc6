"""Fixtures for all tests. What tests import lies in toy.py (a tiny world to run on) and helpers.py (runs and comparisons)."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses: tiny tensors are slower on several threads


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on what ran before it in the same process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report at the end of a run: drawing it takes longer than a toy run. test_run.py has runs with it."""
    monkeypatch.setattr("inflora.run.report.write", lambda folders, out: out / "report.html")


@pytest.fixture(params=["here", pytest.param("process", marks=pytest.mark.slow)])
def cli(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Runs a command line: in this process, and in the slow tier also through `python train.py`."""
    from helpers import Said, train_py

    from inflora.cli import main

    def here(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["train.py"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    def process(*arguments: str) -> Said:
        done = train_py(*arguments)
        return Said(done.returncode, done.stdout, done.stderr)

    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which main() changes
    yield here if request.param == "here" else process
    root.setLevel(level)
    root.handlers[:] = handlers  # Hydra configures the logging of its process
