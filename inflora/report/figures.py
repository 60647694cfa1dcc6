"""The figures of a section. Each function returns a Figure, or None where the runs have nothing to show."""

import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from inflora.metrics import forgetting_per_task as lost_per_task
from inflora.report.groups import Group, Section, statistic
from inflora.report.tables import count_text, duration_text

INK = "#1b2630"  # text and axes; the HTML page replaces it by its own text colour, so that figures follow light and dark
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",  # matplotlib's list of them, which DejaVu Sans leads: a browser may have another
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#8a949e",
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "inflora",  # the same runs give the same file
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}
_WIDTH = 5.2  # inches: text stays readable when the figure is scaled to a phone's screen
_LETTERS_PER_LINE = 68  # of 8-point text across that width
_LETTERS_PER_TITLE_LINE = 48  # bold
# Okabe and Ito's palette without black and yellow, which vanish on dark and on light paper; markers and dashes repeat the distinction.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = "osD^vP"
_DASHES = ("-", "--", "-.", ":")
_FAR_APART = 30  # what is stored is shown on a logarithmic axis where one method keeps so many times more than another
_MOST_TASKS_WITH_NUMBERS = 12  # in a heat map: more do not fit their cells


def figures_of(section: Section) -> Iterator[tuple[str, Figure]]:
    """Every figure that the section's runs allow, each with a name for its files."""
    for draw in (accuracy_curve, forgetting_per_task, accuracy_and_storage, wall_time):
        figure = draw(section)
        if figure is not None:
            yield draw.__name__, figure
    for group in section.groups:
        yield f"accuracy_matrix_{file_name(group.label)}", accuracy_matrix(section, group)


def file_name(text: str) -> str:
    """`text` with everything but letters, digits, dots and dashes replaced by underscores."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


@matplotlib.rc_context(_STYLE)
def save(figure: Figure, path: Path) -> str:
    """Write `path`.png and `path`.svg; return the SVG."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    path.with_name(path.name + ".svg").write_text(svg.getvalue(), encoding="utf-8")
    figure.savefig(path.with_name(path.name + ".png"), dpi=200, facecolor="white")
    return svg.getvalue()


@matplotlib.rc_context(_STYLE)
def accuracy_curve(section: Section) -> Figure:
    """Accuracy over all classes seen so far, after each task; the band is one standard deviation to each side."""
    figure, axes = _axes(section, "Accuracy over all classes seen so far")
    classes = np.cumsum(section.runs[0].summary["task_sizes"])
    for group, style in _styled(section):
        curves = np.array([run.summary["accuracy_curve"] for run in group.runs], dtype=np.float64)  # None becomes nan
        mean = curves.mean(axis=0)
        if len(mean) > 1 and np.isnan(mean[:-1]).all():  # measured once, after all classes
            axes.axhline(mean[-1], color=style["color"], linestyle=":", linewidth=1)
            style["linestyle"] = ":"
        axes.plot(classes, mean, **style)
        if len(curves) > 1:
            std = curves.std(axis=0, ddof=1)
            axes.fill_between(classes, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0)
    axes.set(xlabel="classes seen (one mark per task)", ylabel="accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, section)
    return figure


@matplotlib.rc_context(_STYLE)
def forgetting_per_task(section: Section) -> Figure | None:
    """Best accuracy on each task before the last one, minus its final accuracy; bars are one standard deviation to each side."""
    shown = [(group, style) for group, style in _styled(section) if group.statistic("forgetting").n]
    if not shown:
        return None
    figure, axes = _axes(section, "Forgetting of each task")
    for number, (group, style) in enumerate(shown):
        lost = np.array([lost_per_task(run.accuracy) for run in group.runs])
        shift = 0.5 * ((number + 0.5) / len(shown) - 0.5)  # side by side, so that bars do not cover each other
        std = lost.std(axis=0, ddof=1) if len(lost) > 1 else None
        axes.errorbar(np.arange(lost.shape[1]) + shift, lost.mean(axis=0), yerr=std, elinewidth=1, **style)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="task", ylabel="forgetting (points)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, section)
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_matrix(section: Section, group: Group) -> Figure:
    """Heat map of the accuracy on task j (column) after task i (row), mean over the runs."""
    title = textwrap.wrap(f"Accuracy matrix of {group.label}", _LETTERS_PER_TITLE_LINE)
    figure, axes = _axes(section, "\n".join(title), groups=[group])
    figure.set_size_inches(_WIDTH, 4.6 + 0.17 * (len(title) - 1))
    matrix = group.mean_accuracy()
    image = axes.pcolormesh(np.ma.masked_invalid(matrix), vmin=0, vmax=100, cmap="viridis", edgecolors="face", linewidth=0.2)
    if len(matrix) <= _MOST_TASKS_WITH_NUMBERS:
        _write_numbers(axes, matrix)
    ticks = np.arange(len(matrix), step=1 if len(matrix) <= _MOST_TASKS_WITH_NUMBERS else 5)
    axes.set_xticks(ticks + 0.5, ticks)
    axes.set_yticks(ticks + 0.5, ticks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set(xlabel="tested on task", ylabel="after task", aspect="equal")
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8)
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_and_storage(section: Section) -> Figure | None:
    """Last accuracy against what is stored beside the backbone; None for a single group, where it says nothing."""
    if len(section.groups) < 2:
        return None
    figure, axes = _axes(section, "Last accuracy and stored parameters")
    for group, style in _styled(section):
        accuracy, stored = group.statistic("last_accuracy"), group.statistic("stored_parameters")
        style["linestyle"] = "none"
        axes.errorbar(stored.mean, accuracy.mean, yerr=accuracy.std if accuracy.n > 1 else None, **style)
    axes.set(xlabel="parameters and statistics kept beside the backbone", ylabel="last accuracy (%)")
    stored = [group.statistic("stored_parameters").mean for group in section.groups]
    if min(stored) > 0 and max(stored) > _FAR_APART * min(stored):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.08 * max(stored) or 1)
    axes.xaxis.set_major_formatter(lambda value, _: count_text(value))
    _legend(figure, section)
    return figure


@matplotlib.rc_context(_STYLE)
def wall_time(section: Section) -> Figure:
    """Mean time of a run, in parts."""
    figure, axes = _axes(section, "Time of a run")
    labels = [textwrap.fill(group.label, 24) for group in section.groups]
    most_lines = max(label.count("\n") + 1 for label in labels)
    figure.set_size_inches(_WIDTH, 1.7 + (0.13 + 0.15 * most_lines) * len(labels))
    rows = np.arange(len(section.groups))
    end = np.zeros(len(rows))
    names = {"subspace": "before and after tasks", "train": "train", "evaluate": "evaluate", "other": "other"}
    for (part, name), colour in zip(names.items(), _COLOURS, strict=False):
        seconds = np.array([_seconds(group, part) for group in section.groups])
        axes.barh(rows, seconds, left=end, color=colour, height=0.6, label=name)
        end += seconds
    for row, total in enumerate(end):
        axes.annotate(duration_text(total), (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: duration_text(value) if value else "0")
    figure.legend(loc="outside lower left", ncols=4)
    return figure


def _axes(section: Section, title: str, *, groups: list[Group] | None = None) -> tuple[Figure, Axes]:
    """Axes with a bold title and, below it, the section's title and the number of runs."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    numbers = sorted({len(group.runs) for group in groups or section.groups})
    runs = f"n = {numbers[0]}" if len(numbers) == 1 else f"n = {numbers[0]} to {numbers[-1]}"
    subtitle = textwrap.wrap(f"{section.title}, {runs}", _LETTERS_PER_LINE)
    axes.set_title(title, pad=6 + 11 * len(subtitle))
    axes.annotate("\n".join(subtitle), (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8)
    axes.grid(visible=True)
    return figure, axes


def _styled(section: Section) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Groups with their line style: the same in every figure of the section."""
    for number, group in enumerate(section.groups):
        yield (
            group,
            {
                "label": group.label,
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[number % len(_MARKERS)],
                "linestyle": _DASHES[number % len(_DASHES)],
            },
        )


def _legend(figure: Figure, section: Section) -> None:
    longest = max(len(group.label) for group in section.groups)
    columns = max(1, _LETTERS_PER_LINE // (longest + 7))
    rows = -(-len(section.groups) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))  # the plot keeps its height however long the legend
    figure.legend(loc="outside lower left", ncols=columns)


def _write_numbers(axes: Axes, matrix: NDArray[np.float64]) -> None:
    for row, column in np.argwhere(np.isfinite(matrix)):
        colour = "black" if matrix[row, column] > 55 else "white"  # viridis is dark below
        axes.text(column + 0.5, row + 0.5, f"{matrix[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)


def _seconds(group: Group, part: str) -> float:
    return statistic(run.summary["wall_seconds"][part] for run in group.runs).mean
