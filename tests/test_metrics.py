"""Metrics against a worked example, against slow loops, and at their edges."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inflora import metrics
from inflora.metrics import TestCounter, summarize

NAN = float("nan")


def random_matrix(num_tasks: int, seed: int) -> np.ndarray:
    accuracy = np.random.default_rng(seed).uniform(0.0, 1.0, (num_tasks, num_tasks))
    accuracy[np.triu_indices(num_tasks, 1)] = NAN
    return accuracy


def worked_example() -> np.ndarray:
    """Three tasks; with 100, 200 and 100 test images, every value below follows by hand."""
    return np.array([[0.90, NAN, NAN], [0.80, 0.85, NAN], [0.70, 0.75, 0.95]])


def slow_metrics(r: np.ndarray, n: list[int]) -> dict[str, float]:
    """The definitions, written out one entry at a time."""
    last = len(r) - 1
    micro = [sum(n[j] * r[i, j] for j in range(i + 1)) / sum(n[: i + 1]) for i in range(last + 1)]
    macro = [sum(r[i, j] for j in range(i + 1)) / (i + 1) for i in range(last + 1)]
    steps = [sum(r[t - 1, i] - r[t, i] for i in range(t)) / t for t in range(1, last + 1)]
    return {
        "last_accuracy": micro[-1],
        "last_accuracy_macro": macro[-1],
        "average_accuracy": sum(micro) / (last + 1),
        "average_accuracy_macro": sum(macro) / (last + 1),
        "forgetting": sum(max(r[i, j] for i in range(j, last)) - r[last, j] for j in range(last)) / last,
        "forgetting_clamped": sum(max(r[i, j] for i in range(j, last + 1)) - r[last, j] for j in range(last)) / last,
        "forgetting_coda": sum(steps) / last,
        "forgetting_libcontinual": sum(r[j, j] - r[last, j] for j in range(last - 1)) / last,
        "backward_transfer": sum(r[last, j] - r[j, j] for j in range(last)) / last,
        "learning_accuracy": sum(r[j, j] for j in range(last + 1)) / (last + 1),
    }


def test_worked_example():
    summary = summarize(worked_example(), worked_example(), worked_example(), [100, 200, 100])
    assert summary["accuracy_curve_macro"] == pytest.approx([90, 82.5, 80])
    assert summary["accuracy_curve"] == pytest.approx([90, 250 / 3, 78.75])
    assert summary["average_accuracy_macro"] == pytest.approx(505 / 6)
    assert summary["average_accuracy"] == pytest.approx((90 + 250 / 3 + 78.75) / 3)
    assert summary["last_accuracy"] == pytest.approx(78.75)
    assert summary["forgetting"] == pytest.approx(15)
    assert summary["forgetting_clamped"] == pytest.approx(15)
    assert summary["forgetting_coda"] == pytest.approx(10)
    assert summary["forgetting_libcontinual"] == pytest.approx(10)
    assert summary["backward_transfer"] == pytest.approx(-15)
    assert summary["learning_accuracy"] == pytest.approx(90)
    assert summary["old_class_accuracy_curve"] == [None, pytest.approx(80), pytest.approx((70 + 2 * 75) / 3)]
    assert summary["new_class_accuracy_curve"] == pytest.approx([90, 85, 95])


def test_rates_with_the_task_given_and_found_are_of_their_own_matrices_and_of_images():
    task_aware, task_id = worked_example() / 2, worked_example() / 4
    summary = summarize(worked_example(), task_aware, task_id, [100, 200, 100])
    assert summary["task_aware_accuracy_curve"] == pytest.approx([45, 125 / 3, 78.75 / 2])
    assert summary["task_id_accuracy_curve"] == pytest.approx([22.5, 62.5 / 3, 78.75 / 4])
    assert summary["task_aware_accuracy"] == pytest.approx(78.75 / 2)
    assert summary["task_id_accuracy"] == pytest.approx(78.75 / 4)


@given(num_tasks=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_agrees_with_slow_loops_on_uneven_test_sets(num_tasks: int, seed: int):
    accuracy = random_matrix(num_tasks, seed)
    counts = np.random.default_rng(seed + 1).integers(1, 500, num_tasks).tolist()
    summary = summarize(accuracy, accuracy, accuracy, counts)
    for name, value in slow_metrics(accuracy, counts).items():
        assert summary[name] == pytest.approx(100 * value), name


def test_forgetting_may_be_negative_and_clamped_may_not():
    accuracy = np.array([[0.5, NAN], [0.8, 0.6]])
    assert metrics.forgetting(accuracy) == pytest.approx(-0.3)
    assert metrics.forgetting(accuracy, clamped=True) == 0.0
    assert metrics.forgetting_coda(accuracy) == pytest.approx(-0.3)
    assert metrics.forgetting_libcontinual(accuracy) == 0.0  # two tasks: its sum has no term


def test_best_accuracy_before_the_end_need_not_be_the_first():
    accuracy = np.array([[0.5, NAN, NAN], [0.9, 0.6, NAN], [0.4, 0.5, 0.7]])
    assert metrics.forgetting_per_task(accuracy) == pytest.approx([0.5, 0.1])
    assert metrics.backward_transfer(accuracy) == pytest.approx(-0.1)


def test_micro_is_macro_for_equal_test_sets():
    accuracy = random_matrix(6, seed=3)
    assert metrics.micro_curve(accuracy, [40] * 6) == pytest.approx(metrics.macro_curve(accuracy))


def test_single_task_has_no_forgetting_and_says_why():
    single = np.array([[0.75]])
    summary = summarize(single, single, np.array([[1.0]]), [20])
    assert summary["accuracy_curve"] == [75.0]
    assert summary["average_accuracy"] == summary["learning_accuracy"] == 75.0
    assert summary["old_class_accuracy_curve"] == [None]
    for name in ("forgetting", "forgetting_clamped", "forgetting_coda", "forgetting_libcontinual", "backward_transfer"):
        assert summary[name] is None
        assert summary["null_reasons"][name] == "it needs at least two tasks"


def test_joint_training_fills_only_the_last_row():
    accuracy = np.full((3, 3), NAN)
    accuracy[2] = [0.9, 0.8, 0.7]
    summary = summarize(accuracy, accuracy, accuracy, [10, 10, 20])
    assert summary["accuracy_curve"] == [None, None, pytest.approx(77.5)]
    assert summary["last_accuracy_macro"] == pytest.approx(80)
    assert summary["new_class_accuracy_curve"] == [None, None, pytest.approx(70)]
    undefined = ["average_accuracy", "forgetting", "forgetting_clamped", "forgetting_coda", "backward_transfer", "learning_accuracy"]
    for name in undefined:
        assert summary[name] is None
        assert summary["null_reasons"][name] == "the model was tested only after its last stage"
    assert np.isnan(metrics.forgetting_libcontinual(accuracy[1:, 1:]))  # of two tasks too, where its sum has no term


def test_what_no_single_run_can_give_is_null_with_a_reason():
    summary = summarize(worked_example(), worked_example(), worked_example(), [1, 1, 1])
    assert summary["forward_transfer"] is None
    assert summary["intransigence"] is None
    assert summary["null_reasons"] == {
        "forward_transfer": "without a head for classes not seen yet it is zero by construction",
        "intransigence": "it needs reference models trained jointly on the tasks up to each one",
    }


def test_summary_is_strict_json():
    accuracy = np.full((2, 2), NAN)
    accuracy[1] = [0.5, 0.25]
    written = json.dumps(summarize(accuracy, accuracy, accuracy, [3, 5]), allow_nan=False)
    assert json.loads(written)["last_accuracy"] == pytest.approx(34.375)


def test_one_row_and_column_per_task():
    with pytest.raises(AssertionError, match="one row and column per task"):
        summarize(np.eye(3), np.eye(3), np.eye(3), [1, 1])


# --- counting hits -------------------------------------------------------------------------------------------------------------------

CLASS_TO_TASK = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])  # uneven, with a task of one class


def slow_counts(scores: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    counts = np.zeros((4, 3), dtype=int)
    for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
        task = int(CLASS_TO_TASK[label])
        best = max(range(len(score)), key=score.__getitem__)
        within = max((c for c in range(len(score)) if CLASS_TO_TASK[c] == task), key=score.__getitem__)
        counts[:, task] += [1, best == label, within == label, int(CLASS_TO_TASK[best]) == task]
    return counts


@pytest.mark.parametrize("seen", [3, 4, 8])
def test_counter_agrees_with_a_loop_over_images(seen: int):
    generator = torch.Generator().manual_seed(seen)
    scores = torch.randn(200, seen, generator=generator)
    labels = torch.randint(seen, (200,), generator=generator)
    counter = TestCounter(CLASS_TO_TASK)
    for batch in (slice(0, 7), slice(7, 7), slice(7, 130), slice(130, 200)):  # one of them empty, as one process of several may see
        counter.update(scores[batch], labels[batch])
    assert (counter.counts.numpy() == slow_counts(scores, labels)).all()


def test_tasks_without_images_have_no_rate():
    counter = TestCounter(CLASS_TO_TASK)
    counter.update(torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([1, 1]))
    rates = counter.rates()
    assert rates[:, 0].tolist() == [0.5, 0.5, 1.0]
    assert all(math.isnan(rate) for rate in rates[:, 1:].flatten())


@given(seed=st.integers(0, 2**31), half=st.booleans())
@settings(deadline=None, max_examples=30)
def test_correct_means_right_task_and_right_within_the_task(seed: int, half: bool):
    """An identity that holds image by image; half precision makes ties, which must not break it."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, 8, generator=generator)
    scores = scores.mul(4).round().half() if half else scores
    labels = torch.randint(8, (40,), generator=generator)
    for score, label in zip(scores.split(1), labels.split(1), strict=True):
        counter = TestCounter(CLASS_TO_TASK)
        counter.update(score, label)
        images, correct, within, right_task = counter.counts.sum(dim=1).tolist()
        assert images == 1
        assert correct == (within and right_task)
