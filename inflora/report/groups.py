"""From runs to comparisons: sections that share data and weights, groups that differ only in the seed, statistics over a group."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inflora.report.runs import Run

_HASHES = ("test_hash", "train_hash", "weights")
_LONGEST_SETTINGS_IN_A_LABEL = 40  # characters: beyond that, a legend does not fit below its plot


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (ddof 1) over `n` values; nan where there are too few."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Group:
    """Repetitions of one method with the same settings; they differ in their seed only.

    Attributes:
        label: the method, and what sets it apart from other groups of that method in the section.
        differences: the settings in which the groups of this method differ, with the values here.
        runs: at least one, by seed.
    """

    label: str
    method: str
    differences: dict[str, str]
    runs: list[Run]

    def statistic(self, name: str) -> Statistic:
        """Statistic of a scalar of summary.json; runs in which it is null do not count."""
        return statistic(run.summary[name] for run in self.runs)

    def mean_accuracy(self) -> NDArray[np.float64]:
        """(T, T) accuracy matrix in percent, the mean over the runs."""
        return np.mean([run.accuracy for run in self.runs], axis=0)


@dataclass(frozen=True)
class Section:
    """Groups that may be compared: same images, tasks, input pipeline and pretrained weights."""

    title: str
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


@dataclass(frozen=True)
class Difference:
    """`reference` minus `other`, run by run on the same seed and class order."""

    reference: Group
    other: Group
    last_accuracy: list[float]
    average_accuracy: list[float]
    forgetting: list[float]


def statistic(values: Iterable[float | None]) -> Statistic:
    """Statistic of those of `values` that are not None."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = float(known.mean()) if len(known) else float("nan")
    return Statistic(mean, float(known.std(ddof=1)) if len(known) > 1 else float("nan"), len(known))


def sections_of(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """Sort runs into sections and groups, best last accuracy first.

    Returns:
        The sections, and one sentence for each run that was left out because one that ended later repeats it.
    """
    by_data = _split(runs, _what_must_agree)
    sections, left_out = [], []
    for title, (_, members) in zip(_titles(list(by_data)), by_data, strict=True):
        groups, repeated = _groups_of(members)
        sections.append(Section(title, groups))
        left_out += repeated
    return sections, left_out


def paired_differences(section: Section, reference: str) -> list[Difference]:
    """Differences between one group and every other that shares a seed and class order with it.

    Args:
        reference: a method; of its groups in the section, the best that can be paired is compared; where there is none, the best of all.
    """
    candidates = [group for group in section.groups if group.method == reference] or section.groups[:1]
    return next(filter(None, (_differences_from(first, section) for first in candidates)), [])


def _differences_from(first: Group, section: Section) -> list[Difference]:
    differences = []
    for other in section.groups:
        pairs = [(a, b) for a in first.runs for b in other.runs if a.stream == b.stream]
        if other is not first and pairs:
            names = ("last_accuracy", "average_accuracy", "forgetting")
            differences.append(Difference(first, other, *(_subtract(pairs, name) for name in names)))
    return differences


def _subtract(pairs: list[tuple[Run, Run]], name: str) -> list[float]:
    values = [(a.summary[name], b.summary[name]) for a, b in pairs]
    return [a - b for a, b in values if a is not None and b is not None]


def _what_must_agree(run: Run) -> dict[str, str]:
    """Everything about data and weights that makes accuracies incomparable when it differs."""
    summary = run.summary
    settings = {key: value for key, value in run.settings.items() if key.startswith(("dataset.", "backbone."))}
    hashes = {key: summary[key][:12] for key in ("test_hash", "train_hash") if key in summary}
    is_random = summary["weights"]["source"] == "random"  # drawn with the run's seed
    hashes["weights"] = "random" if is_random else summary["weights"]["tensors_sha256"][:12]  # that of the file would part equal ones
    return {"dataset": summary["dataset"], "backbone": summary["backbone"], **settings, **hashes}


def _groups_of(runs: list[Run]) -> tuple[list[Group], list[str]]:
    groups, left_out = [], []
    for method in dict.fromkeys(run.summary["method"] for run in runs):
        same_method = [run for run in runs if run.summary["method"] == method]
        by_settings = _split(same_method, lambda run: run.settings)
        differences = differing([settings for settings, _ in by_settings])
        for number, (differs, (_, members)) in enumerate(zip(differences, by_settings, strict=True), start=1):
            latest = {run.summary["seed"]: run for run in sorted(members, key=lambda run: (run.path / "summary.json").stat().st_mtime)}
            kept = [latest[seed] for seed in sorted(latest)]
            repeated = (run for run in members if run is not latest[run.summary["seed"]])
            left_out += [f"{run.path} is repeated by {latest[run.summary['seed']].path}: left out." for run in repeated]
            groups.append(Group(_label(method, differs, number), method, differs, kept))
    return sorted(groups, key=lambda group: -group.statistic("last_accuracy").mean), left_out


def _label(method: str, differs: dict[str, str], number: int) -> str:
    text = ", ".join(f"{key}={value}" for key, value in differs.items())
    if not text:
        return method
    return f"{method} ({text})" if len(text) <= _LONGEST_SETTINGS_IN_A_LABEL else f"{method} [{number}]"


def _titles(by_data: list[tuple[dict[str, str], list[Run]]]) -> list[str]:
    """Data and backbone; where several sections share them, what sets them apart: settings, else their folders' names, else hashes."""
    titles = []
    for data, _ in by_data:
        same_name = [part for part in by_data if (part[0]["dataset"], part[0]["backbone"]) == (data["dataset"], data["backbone"])]
        settings = [{key: value for key, value in other.items() if key not in _HASHES} for other, _ in same_name]
        has_other_images = len({(other.get("test_hash"), other.get("train_hash")) for other, _ in same_name}) > 1
        folders = [{"images": Path(members[0].root).name or members[0].root} if has_other_images else {} for _, members in same_name]
        shown: list[dict[str, str]] = [{} for _ in same_name]
        for more in (settings, folders, [other for other, _ in same_name]):
            shown = [known | further for known, further in zip(shown, more, strict=True)]
            differs = differing(shown)
            if len({tuple(entries.items()) for entries in differs}) == len(same_name):
                break
        own = differs[[other for other, _ in same_name].index(data)]
        details = ", ".join(f"{key}={shorten(value)}" for key, value in own.items())
        titles.append(f"{data['dataset']}, {data['backbone']}" + (f" ({details})" if details else ""))
    return titles


def shorten(text: str) -> str:
    """A value as a title or a cell can hold it; long ones, such as a class order, are told apart by a hash."""
    return text if len(text) <= _LONGEST_SETTINGS_IN_A_LABEL else f"{text[:20]}… ({hashlib.sha256(text.encode()).hexdigest()[:6]})"


def differing(settings: list[dict[str, str]]) -> list[dict[str, str]]:
    """For each of several settings, the entries whose value is not the same in all of them; a missing key reads "absent"."""
    keys = list(dict.fromkeys(key for entries in settings for key in entries))
    keys = [key for key in keys if len({entries.get(key) for entries in settings}) > 1]
    return [{key: entries.get(key, "absent") for key in keys} for entries in settings]


def _split(runs, key) -> list[tuple[dict[str, str], list[Run]]]:
    """Runs with an equal `key(run)`, in order of first appearance."""
    parts: list[tuple[dict[str, str], list[Run]]] = []
    for run in runs:
        value = key(run)
        for known, members in parts:
            if known == value:
                members.append(run)
                break
        else:
            parts.append((value, [run]))
    return parts
