"""Fixtures for all tests. What tests import lies in toy.py (a tiny world to run on) and helpers.py (runs and comparisons)."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses: tiny tensors are slower on several threads


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report at the end of a run: drawing it takes longer than a toy run. test_run.py has runs with it."""
    monkeypatch.setattr("inflora.run.report.write", lambda folders, out: out / "report.html")
