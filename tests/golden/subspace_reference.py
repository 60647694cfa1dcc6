"""Subspace memories and designed factors computed a second time, in plain NumPy float64, straight from the written algorithm.

Independent of the package: dense projectors and full SVDs, nothing in free coordinates. `python tests/golden/subspace_reference.py`
rewrites `subspace.json`, which holds, per case and task: the design made before the task (its row space), then the memory after it
(kind, stored columns, protected dimension, and its projector). Projectors are stored applied to two fixed probe vectors: different
subspaces could agree on those only by accident.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

RANK = 4
PROBES = 2

# name -> inputs' width, their rank, decay of their spectrum, thresholds of the tasks, and the variant of the algorithm.
# Together they reach: both energies, both kinds from the first task on, the switch, plain GPM beyond half the space, a full space.
CASES: dict[str, dict[str, Any]] = {
    "gram": {"dim": 48, "rank": 48, "decay": 0.5, "thresholds": [0.95, 0.96, 0.97, 0.98, 0.99], "energy": "gram", "dual": True},
    "gram_switch": {"dim": 32, "rank": 10, "decay": 0.1, "thresholds": [0.9, 0.93, 0.96, 0.98], "energy": "gram", "dual": True},
    "gram_plain": {"dim": 32, "rank": 10, "decay": 0.1, "thresholds": [0.9, 0.93, 0.96, 0.98], "energy": "gram", "dual": False},
    "gram_first_above_half": {"dim": 24, "rank": 24, "decay": 0.05, "thresholds": [0.95, 0.96, 0.98], "energy": "gram", "dual": True},
    "input": {"dim": 40, "rank": 12, "decay": 0.8, "thresholds": [0.8, 0.85, 0.9, 0.95], "energy": "input", "dual": True},
    "input_first_above_half": {"dim": 24, "rank": 24, "decay": 0.3, "thresholds": [0.95, 0.97], "energy": "input", "dual": True},
    "low_rank": {"dim": 30, "rank": 6, "decay": 1.0, "thresholds": [0.999, 0.999, 0.999], "energy": "gram", "dual": True},
}


def inputs(name: str) -> list[np.ndarray]:
    """One (dim, dim) second moment per task: `rank` random directions with a power-law spectrum, and a mean; always the same."""
    case = CASES[name]
    random = np.random.RandomState(sorted(CASES).index(name))
    moments = []
    for _ in case["thresholds"]:
        directions = np.linalg.qr(random.standard_normal((case["dim"], case["rank"])))[0]
        coordinates = random.standard_normal((300, case["rank"])) * np.arange(1, case["rank"] + 1) ** -float(case["decay"])
        coordinates[:, 0] += 1  # tokens have a mean
        tokens = coordinates @ directions.T
        moments.append(tokens.T @ tokens / len(tokens))
    return moments


def probes(dim: int) -> np.ndarray:
    return np.random.RandomState(12345).standard_normal((dim, PROBES))


def free_projector(kind: str, G: np.ndarray, dim: int) -> np.ndarray:
    return G @ G.T if kind == "retain" else np.eye(dim) - G @ G.T


def update(kind: str | None, G: np.ndarray, C: np.ndarray, eps: float, energy: str, dual: bool) -> tuple[str, np.ndarray]:
    """One update of a memory; kind None is a fresh one."""
    dim = len(C)
    P = np.eye(dim) if kind is None else free_projector(kind, G, dim)
    R, power, E = (P @ C, 2, np.sum(C**2)) if energy == "gram" else (P @ C @ P, 1, np.trace(C))
    U, S, _ = np.linalg.svd(R)
    S = np.where(dim * np.finfo(float).eps * np.linalg.norm(C, 2) < S, S, 0)
    numerical_rank = np.count_nonzero(S)
    gained = np.cumsum(S**power) / E
    captured = 1 - np.sum(S**power) / E

    if kind is None:
        below = int(np.sum(gained < eps))  # strictly
        k = max(below, 1) if energy == "gram" else below + 1
        k = min(k, numerical_rank)
        if dual and k >= dim / 2:
            return "retain", U[:, k:]
        return "remove", U[:, :k]

    if kind == "remove":
        j = next((j for j in range(numerical_rank + 1) if captured + (gained[j - 1] if j else 0) >= eps), numerical_rank)
        if j:
            G = np.concatenate([G, U[:, :j]], axis=1)
        if dual and G.shape[1] > dim / 2:
            return "retain", np.linalg.svd(G)[0][:, G.shape[1] :]
        return "remove", G

    left = 1 - captured
    j = next((j for j in range(numerical_rank + 1) if left - (gained[j - 1] if j else 0) < 1 - eps), numerical_rank)
    if j:
        Y = G - U[:, :j] @ (U[:, :j].T @ G)
        G = np.linalg.svd(Y)[0][:, : G.shape[1] - j]
    return "retain", G


def design(kind: str | None, G: np.ndarray, C: np.ndarray, decomposition: str) -> np.ndarray | None:
    """(RANK, dim) orthonormal rows; None where P C has fewer dimensions than that: the algorithm then says nothing about them."""
    P = np.eye(len(C)) if kind is None else free_projector(kind, G, len(C))
    R = P @ C if decomposition == "PC" else P @ C @ P
    U, S, _ = np.linalg.svd(R)
    return U[:, :RANK].T if S[RANK - 1] > 1e-9 * np.linalg.norm(C, 2) else None


def compute() -> dict[str, list[dict[str, Any]]]:
    golden = {}
    for name, case in CASES.items():
        kind, G, tasks = None, np.zeros((case["dim"], 0)), []
        probe = probes(case["dim"])
        for C, eps in zip(inputs(name), case["thresholds"], strict=True):
            rows = {decomposition: design(kind, G, C, decomposition) for decomposition in ("PC", "PCP")}
            kind, G = update(kind, G, C, eps, case["energy"], case["dual"])
            used = probe - free_projector(kind, G, case["dim"]) @ probe
            tasks.append(
                {
                    "kind": kind,
                    "columns": G.shape[1],
                    "dimension": G.shape[1] if kind == "remove" else case["dim"] - G.shape[1],
                    "protected": np.round(used, 10).tolist(),
                    **{f"design_{key}": None if A is None else np.round(A.T @ (A @ probe), 10).tolist() for key, A in rows.items()},
                }
            )
        golden[name] = tasks
    return golden


if __name__ == "__main__":
    path = Path(__file__).with_name("subspace.json")
    path.write_text(json.dumps(compute()) + "\n")
    for name, tasks in compute().items():
        print(name, [(task["kind"], task["dimension"]) for task in tasks])
