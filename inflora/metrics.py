"""From test scores to the numbers of a result table.

`accuracy[i, j]` is the accuracy on the test set of task j after training task i: a fraction, float64, over the classes seen after task
i. Entries above the diagonal, and rows that were never measured (joint training is tested only once, in the last row), are nan; so is
every number below that would need them, and `summarize` writes such numbers as null, with the reason.

Everything here works on NumPy arrays, and on the methods of the tensors it is given: what only reads results need not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]


class TestCounter:
    """Counts hits per task over the batches of an evaluation, without copying anything to the host before the end.

    With c_hat the class of highest score and tau the task of a class, an image of class y is counted as
    correct (c_hat = y), correct within its task (argmax over the classes of tau(y) only), and in the right task
    (tau(c_hat) = tau(y)). Image by image the first holds exactly when the other two do.

    Attributes:
        counts: (4, T) long, per true task: images, correct, correct within the task, right task. Sums over batches and processes.
        num_nan: () long, scores that are no numbers: an image with one would count as of that class.
    """

    __test__ = False  # not a pytest class, whatever its name

    def __init__(self, class_to_task: Tensor):
        """`class_to_task`: (num_classes,) long, the task of every class; its device is where the counting happens."""
        self.class_to_task = class_to_task
        self.counts = class_to_task.new_zeros(4, int(class_to_task.max()) + 1).int()  # mps adds no longs in some versions
        self.num_nan = class_to_task.new_zeros(())

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            scores: (B, number of classes seen so far), any float type; B may be 0.
            labels: (B,) long, below the number of seen classes.
        """
        self.num_nan += scores.isnan().sum()
        task_of = self.class_to_task[: scores.shape[1]]
        true_task = task_of[labels]
        predicted = scores.argmax(dim=1)
        within = scores.masked_fill(task_of != true_task.unsqueeze(1), float("-inf")).argmax(dim=1)
        hits = (labels == labels, predicted == labels, within == labels, task_of[predicted] == true_task)
        for row, hit in zip(self.counts, hits, strict=True):
            row.index_add_(0, true_task, hit.int())

    def rates(self) -> Array:
        """(3, T) shares of a task's images: correct, correct within the task, right task. Nan for tasks without an image."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        return counts[1:] / np.where(counts[0] > 0, counts[0], np.nan)


def micro_curve(accuracy: Array, test_counts: Sequence[int]) -> Array:
    """(T,) share of correct images among all test images of the tasks seen so far, after each task."""
    return _row_means(accuracy, np.tril(np.ones_like(accuracy)) * np.asarray(test_counts))


def macro_curve(accuracy: Array) -> Array:
    """(T,) mean over the tasks seen so far of the accuracy on each, after each task. Equals `micro_curve` for equal test sets."""
    return micro_curve(accuracy, [1] * len(accuracy))


def old_class_curve(accuracy: Array, test_counts: Sequence[int]) -> Array:
    """(T,) share of correct images among those of the tasks before the current one; nan after the first task."""
    return _row_means(accuracy, np.tril(np.ones_like(accuracy), -1) * np.asarray(test_counts))


def forgetting_per_task(accuracy: Array, *, clamped: bool = False) -> Array:
    """(T - 1,) best accuracy on task j before the last task, minus the final one; can be negative.

    With `clamped` the best may be the final one too, so that no entry is negative (L2P, its ports, PILOT).
    """
    last = len(accuracy) - 1
    known = np.where(np.tril(np.ones_like(accuracy)) > 0, accuracy, -np.inf)
    candidates = known if clamped else known[:-1]
    return candidates[:, :last].max(axis=0, initial=-np.inf) - accuracy[-1, :last]


def forgetting(accuracy: Array, *, clamped: bool = False) -> float:
    """Mean of `forgetting_per_task`; nan for a single task. The definition meant when nothing else is said."""
    return _mean(forgetting_per_task(accuracy, clamped=clamped))


def forgetting_coda(accuracy: Array) -> float:
    """Mean over steps t of the mean drop of the older tasks from t - 1 to t (CODA-Prompt): several times smaller than `forgetting`."""
    drop = np.tril(accuracy[:-1] - accuracy[1:])
    return _mean(drop.sum(axis=1) / np.arange(1, len(accuracy)))


def forgetting_libcontinual(accuracy: Array) -> float:
    """The drop since each task was learned, as LibContinual sums it: without the last two tasks, yet over T - 1. Only for checks."""
    num_tasks = len(accuracy)
    if np.isnan(accuracy[:-1]).all():  # a single task, or tested only once
        return float("nan")
    drop = np.diag(accuracy) - accuracy[-1]
    return float(drop[: num_tasks - 2].sum() / (num_tasks - 1))


def backward_transfer(accuracy: Array) -> float:
    """Mean change of the older tasks between learning them and the end; minus `forgetting` when each was best right after learning."""
    return _mean((accuracy[-1] - np.diag(accuracy))[:-1])


def learning_accuracy(accuracy: Array) -> float:
    """Mean accuracy on each task right after learning it (plasticity)."""
    return _mean(np.diag(accuracy))


def summarize(accuracy: Array, task_aware: Array, task_id: Array, test_counts: Sequence[int]) -> dict[str, Any]:
    """Every metric that one run can give, under its name in summary.json.

    Args:
        accuracy: (T, T) class-incremental accuracy, as at the top of this file.
        task_aware: (T, T) accuracy when the task of every image is given.
        task_id: (T, T) share of images whose predicted class belongs to the right task.
        test_counts: (T,) test images of each task.

    Returns:
        Percent, as Python floats and lists; None where undefined. `null_reasons` says why, for every name that is None as a whole.
    """
    assert accuracy.shape == task_aware.shape == task_id.shape == (len(test_counts), len(test_counts)), "one row and column per task"
    micro, macro = micro_curve(accuracy, test_counts), macro_curve(accuracy)
    task_aware_curve, task_id_curve = micro_curve(task_aware, test_counts), micro_curve(task_id, test_counts)
    metrics = {
        "accuracy_curve": micro,
        "accuracy_curve_macro": macro,
        "last_accuracy": micro[-1],
        "last_accuracy_macro": macro[-1],
        "average_accuracy": _mean(micro),
        "average_accuracy_macro": _mean(macro),
        "forgetting": forgetting(accuracy),
        "forgetting_clamped": forgetting(accuracy, clamped=True),
        "forgetting_coda": forgetting_coda(accuracy),
        "forgetting_libcontinual": forgetting_libcontinual(accuracy),
        "backward_transfer": backward_transfer(accuracy),
        "learning_accuracy": learning_accuracy(accuracy),
        "forward_transfer": float("nan"),
        "intransigence": float("nan"),
        "task_aware_accuracy": task_aware_curve[-1],
        "task_aware_accuracy_curve": task_aware_curve,
        "task_id_accuracy": task_id_curve[-1],
        "task_id_accuracy_curve": task_id_curve,
        "old_class_accuracy_curve": old_class_curve(accuracy, test_counts),
        "new_class_accuracy_curve": np.diag(accuracy),
    }
    written = {name: _percent(value) for name, value in metrics.items()}
    return {**written, "null_reasons": _null_reasons(written, len(test_counts))}


def _null_reasons(written: dict[str, Any], num_tasks: int) -> dict[str, str]:
    measured_once = "the model was tested only after its last stage"
    reasons = {
        "forward_transfer": "without a head for classes not seen yet it is zero by construction",
        "intransigence": "it needs reference models trained jointly on the tasks up to each one",
    }
    default = "it needs at least two tasks" if num_tasks == 1 else measured_once
    return {name: reasons.get(name, default) for name, value in written.items() if value is None}


def _row_means(accuracy: Array, weights: Array) -> Array:
    """(T,) weighted mean of each row; entries of weight zero do not take part, nan or not, and a row of such entries alone is nan."""
    total = weights.sum(axis=1)
    return (np.where(weights > 0, accuracy, 0.0) * weights).sum(axis=1) / np.where(total > 0, total, np.nan)


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percent(value: Array | float) -> Any:
    if isinstance(value, np.ndarray):
        return [_percent(float(entry)) for entry in value]
    return None if np.isnan(value) else 100.0 * float(value)
