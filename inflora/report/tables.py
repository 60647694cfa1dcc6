"""Tables of a section, as plain cells; and the ways to write a table: markdown, LaTeX, CSV, terminal."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from inflora.report.groups import Group, Section, Statistic, paired_differences, shorten, statistic

UNDEFINED = "–"

# name in summary.json -> heading; what each means is in `MEANINGS`
_HEADLINE = {
    "last_accuracy": "last",
    "average_accuracy": "average",
    "forgetting": "forgetting",
    "backward_transfer": "BWT",
    "task_aware_accuracy": "task given",
    "task_id_accuracy": "task found",
}
_OTHER_DEFINITIONS = {
    "last_accuracy_macro": "last, macro",
    "average_accuracy_macro": "average, macro",
    "learning_accuracy": "learning",
    "forgetting_clamped": "forgetting, clamped",
    "forgetting_coda": "forgetting, CODA",
    "forgetting_libcontinual": "forgetting, LibContinual",
}

_PUBLISHED = {name: _HEADLINE[name] for name in ("last_accuracy", "average_accuracy")}

MEANINGS = {
    "last": "accuracy over all classes after the last task: share of correct test images (micro).",
    "average": "mean over the tasks of the accuracy over all classes seen so far.",
    "forgetting": "best accuracy on a task before the last one, minus its final accuracy; mean over all tasks but the last.",
    "BWT": "backward transfer: final accuracy on a task minus its accuracy right after learning it; mean over all tasks but the last.",
    "task given": "last accuracy when the task of every image is given (argmax over the classes of that task).",
    "task found": "share of images whose predicted class belongs to the right task, after the last task.",
    "trained": "parameters trained at a time (in the task that trains most).",
    "stored": "numbers kept beside the pretrained backbone at the end: parameters, statistics, and every pixel of a kept image.",
    "memory": "most memory in use at a time: of the GPU where there is one, else of the whole process, torch included.",
    "macro": "mean over tasks instead of over images.",
    "learning": "mean accuracy on each task right after learning it.",
    "clamped, CODA, LibContinual": "as L2P and PILOT, CODA-Prompt, and LibContinual define forgetting: comparable only within a kind.",
}


_LATEX = str.maketrans({
    **{character: rf"\{character}" for character in "_%&#${}"},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "−": "$-$", UNDEFINED: "--", "…": r"\ldots{}",
})  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are numbers."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def main_table(section: Section) -> Table:
    """Accuracy, forgetting and cost of every group."""
    header = ["method", "n", *_HEADLINE.values(), "trained", "stored", "memory", "time"]
    return Table("Percent, mean ± sample standard deviation over n runs", header, [_main_row(group) for group in section.groups])


def _main_row(group: Group) -> list[str]:
    cost = [count_text(group.statistic(name).mean) for name in ("trainable_parameters", "stored_parameters")]
    memory = bytes_text(group.statistic("peak_memory_bytes").mean)
    time = duration_text(statistic(run.summary["wall_seconds"]["total"] for run in group.runs).mean)
    return [group.label, str(len(group.runs)), *(statistic_text(group.statistic(name)) for name in _HEADLINE), *cost, memory, time]


def definitions_table(section: Section) -> Table:
    """The other definitions in circulation, for comparing with published numbers."""
    rows = [[group.label, *(statistic_text(group.statistic(name)) for name in _OTHER_DEFINITIONS)] for group in section.groups]
    return Table("The same runs under other definitions, percent", ["method", *_OTHER_DEFINITIONS.values()], rows)


def differences_table(section: Section, reference: str) -> Table | None:
    """Paired differences on the same seeds and class orders; None where nothing can be paired."""
    differences = paired_differences(section, reference)
    if not differences:
        return None
    rows = [
        [
            difference.other.label,
            str(len(difference.last_accuracy)),
            *(
                statistic_text(statistic(values), sign=True)
                for values in (difference.last_accuracy, difference.average_accuracy, difference.forgetting)
            ),
            f"{sum(value > 0 for value in difference.last_accuracy)} of {len(difference.last_accuracy)}",
        ]
        for difference in differences
    ]
    label = differences[0].reference.label
    header = ["other method", "pairs", "last", "average", "forgetting", f"last, {label} higher"]
    return Table(f"{label} minus each other method, on the same seeds and class orders, percentage points", header, rows)


def settings_table(section: Section) -> Table | None:
    """The settings behind labels of several groups of one method; None where no method has several."""
    rows = [[group.label, key, value] for group in section.groups for key, value in group.differences.items()]
    return Table("Settings in which groups of the same method differ", ["method", "setting", "value"], rows) if rows else None


def published_table(section: Section) -> Table | None:
    """The published accuracy of the groups' recipes beside what was reached here; None where there is none."""
    rows = []
    for group in section.groups:
        known = [found for run in group.runs if (found := run.summary.get("published"))]
        published = known[-1] if known else {}
        figures = [published.get(name) for name in _PUBLISHED]
        if figures != [None, None]:
            cells = (
                text
                for name, figure in zip(_PUBLISHED, figures, strict=True)
                for text in (statistic_text(group.statistic(name)), UNDEFINED if figure is None else percent_text(figure))
            )
            typed = dict.fromkeys(change for found in known for change in (["not known"] if found["changes"] is None else found["changes"]))
            by = published["figures"] or published["source"]
            rows.append([group.label, *cells, by, "; ".join(published["differs"]) or UNDEFINED, ", ".join(typed) or UNDEFINED])
    header = ["method", "last", "last, published", "average", "average, published", "published by", "otherwise there", "changed here"]
    return Table("What was published with the recipes of these runs, percent", header, rows) if rows else None


def provenance_table(section: Section) -> Table:
    """Seeds, class orders, code and machine of every group."""
    header = ["method", "seeds", "class orders", "code", "torch", "device"]
    rows = []
    for group in section.groups:
        summaries = [run.summary for run in group.runs]
        orders = {tuple(summary["class_order"]) for summary in summaries}
        number = "" if len(orders) == 1 else f" ({len(orders)} orders)"
        columns = (
            [str(summary["seed"]) for summary in summaries],
            [shorten(group.runs[0].settings["dataset.class_order"]) + number],
            [_revision_text(part) for run in group.runs for part in run.history],
            [part["versions"]["torch"] for run in group.runs for part in run.history],
            [part["device"] for run in group.runs for part in run.history],
        )
        rows.append([group.label, *(", ".join(dict.fromkeys(column)) for column in columns)])
    return Table("Where the numbers come from", header, rows)


def _revision_text(part: dict[str, Any]) -> str:
    commit = part["git_commit"]
    return (commit[:9] if commit else "unknown") + (", changed" if part["git_dirty"] else "")


def runs_frame(sections: Iterable[Section]) -> pd.DataFrame:
    """One row per run: its folder, its group's label, every scalar of summary.json (wall_seconds in parts), and every setting."""
    rows = []
    for section in sections:
        for group in section.groups:
            for run in group.runs:
                scalars = {name: value for name, value in run.summary.items() if name != "published" and not isinstance(value, list | dict)}
                times = {f"wall_seconds_{part}": value for part, value in run.summary["wall_seconds"].items()}
                order = json.dumps(run.summary["class_order"])
                names = {"run": run.path.as_posix(), "section": section.title, "label": group.label}
                rows.append({**names, **scalars, **times, "class_order": order, **run.settings})
    return pd.DataFrame(rows)


def to_frame(table: Table) -> pd.DataFrame:
    """The same cells as a frame, which notebooks show as a table."""
    return pd.DataFrame(table.rows, columns=table.header).set_index(table.header[0])


def to_markdown(table: Table) -> str:
    alignment = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [map(markdown_text, table.header), alignment, *(map(markdown_text, row) for row in table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return f"{markdown_text(table.caption)}:\n\n" + "\n".join(lines) + "\n"


def markdown_text(text: str) -> str:
    """`text` without a meaning for markdown; an underscore inside a word has none."""
    return re.sub(r"[|*<`]|_(?!\w)|(?<!\w)_", r"\\\g<0>", text)


def to_latex(section: Section) -> str:
    """The main table, for a document that loads booktabs."""
    table = main_table(section)
    rows = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_cell(section.title)}. {_latex_cell(table.caption)}.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        " & ".join(_latex_cell(cell) for cell in table.header) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def print_section(section: Section, console: Console) -> None:
    """The first columns of the main table: as many as fit a terminal of 80 columns."""
    table = main_table(section)
    shown = ["method", "n", "last", "average", "forgetting"]
    rich_table = RichTable(
        title=escape(section.title), caption=table.caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    for name in shown:
        rich_table.add_column(name, justify="left" if name == "method" else "right")
    for row in table.rows:
        rich_table.add_row(*(escape(row[table.header.index(name)]) for name in shown))
    console.print(rich_table)


def published_rows(published: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What a recipe says of itself, as headings and texts; `published` is that of summary.json."""
    if published is None:
        return
    yield "recipe", published["source"]
    figures = [f"{name} {percent_text(published[key])}" for key, name in _PUBLISHED.items() if published[key] is not None]
    if figures:
        by = f" ({published['figures']})" if published["figures"] else ""
        yield "published", ", ".join(figures) + by
    if published["differs"]:
        yield "otherwise there", "; ".join(published["differs"])
    if figures and published["changes"]:
        yield "changed here", ", ".join(published["changes"])


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of one run; `summary` is the content of its summary.json."""
    title = f"{summary['dataset']}, {summary['backbone']}, {summary['method']}, seed {summary['seed']}"
    table = RichTable(title=title, title_justify="left", show_header=False, box=SIMPLE)
    names = {
        "last accuracy": "last_accuracy",
        "average accuracy": "average_accuracy",
        "forgetting": "forgetting",
        "backward transfer": "backward_transfer",
        "task given": "task_aware_accuracy",
        "task found": "task_id_accuracy",
    }
    for text, name in names.items():
        table.add_row(text, percent_text(summary[name]) if summary[name] is not None else f"{UNDEFINED} ({summary['null_reasons'][name]})")
    curve = [UNDEFINED if value is None else f"{value:.1f}" for value in summary["accuracy_curve"]]
    table.add_row("after each task", " ".join(curve))
    for text, value in published_rows(summary.get("published")):
        table.add_row(text, escape(value))
    table.add_row("parameters trained", f"{count_text(summary['trainable_parameters'])} of {count_text(summary['total_parameters'])}")
    parts = [f"{name} {duration_text(seconds)}" for name, seconds in summary["wall_seconds"].items() if name != "total"]
    table.add_row("time", f"{duration_text(summary['wall_seconds']['total'])} ({', '.join(parts)})")
    (console or Console()).print(table)


def percent_text(value: float, *, sign: bool = False) -> str:
    """Two decimals, with a true minus sign."""
    return f"{value:{'+' if sign else ''}.2f}".replace("-", "−")


def statistic_text(value: Statistic, *, sign: bool = False) -> str:
    """`72.31 ± 0.45`; without the deviation for one run, a dash for none."""
    if value.n == 0:
        return UNDEFINED
    mean = percent_text(value.mean, sign=sign)
    return mean if np.isnan(value.std) else f"{mean} ± {value.std:.2f}"


def count_text(count: float) -> str:
    """A number of parameters, with three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g} {unit}"
    return f"{count:.0f}"


def bytes_text(size: float) -> str:
    """`1.42 GB`: decimal units, three digits."""
    return f"{float(f'{size / 1e9:.3g}'):g} GB" if size >= 0.9995e9 else f"{size / 1e6:.0f} MB"


def duration_text(seconds: float) -> str:
    """Seconds below 100 s, minutes below 100 min, else hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _latex_cell(text: str) -> str:
    return text.translate(_LATEX)
