"""The report as one markdown file and one self-contained HTML file."""

from dataclasses import dataclass

import jinja2

from inflora.report.figures import INK
from inflora.report.groups import Section, differing
from inflora.report.tables import (
    MEANINGS,
    Table,
    definitions_table,
    differences_table,
    main_table,
    markdown_text,
    provenance_table,
    published_table,
    settings_table,
    to_markdown,
)


@dataclass(frozen=True)
class Part:
    """A section, ready to be written.

    Attributes:
        facts: one line about data and input pipeline.
        tables: tables below the figures; `main` stands above them.
        figures: file name without ending (relative to the report's folder) -> SVG text.
        notes: sentences a reader should know before trusting the numbers.
    """

    title: str
    facts: str
    main: Table
    tables: list[Table]
    figures: dict[str, str]
    notes: list[str]


def part_of(section: Section, reference: str, figures: dict[str, str]) -> Part:
    """Tables, facts and notes of a section, with its figures."""
    tables = [
        differences_table(section, reference),
        published_table(section),
        definitions_table(section),
        settings_table(section),
        provenance_table(section),
    ]
    return Part(section.title, _facts(section), main_table(section), [table for table in tables if table], figures, _notes(section))


def to_markdown_page(parts: list[Part], left_out: list[str]) -> str:
    """report.md: figures are links to the PNG files beside it."""
    blocks = ["# Report"]
    for part in parts:
        blocks += [f"## {markdown_text(part.title)}", markdown_text(part.facts), to_markdown(part.main), *map(markdown_text, part.notes)]
        blocks += [f"![{name.rsplit('/')[-1]}]({name}.png)" for name in part.figures]
        blocks += [to_markdown(table) for table in part.tables]
    blocks += ["## What the columns mean", "\n".join(f"- **{name}**: {meaning}" for name, meaning in MEANINGS.items())]
    if left_out:
        blocks += ["## Runs left out", "\n".join(f"- {sentence}" for sentence in left_out)]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def to_html_page(parts: list[Part], left_out: list[str]) -> str:
    """report.html: figures are inside it, in the text colour of the page."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("inflora.report", "."), autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["inline"] = _inline_svg
    return environment.get_template("page.html.j2").render(parts=parts, left_out=left_out, meanings=MEANINGS)


def _inline_svg(svg: str) -> str:
    """The SVG element alone, with `INK` replaced by the colour of the surrounding text."""
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _facts(section: Section) -> str:
    summary = section.runs[0].summary
    sizes = summary["task_sizes"]
    classes = str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes))
    tasks = "1 task" if len(sizes) == 1 else f"{len(sizes)} tasks"
    return (
        f"{tasks} of {classes} classes, {sum(summary['test_counts'])} test images (split {summary['split']}); backbone "
        f"{summary['backbone_tag']}; transform {summary['transform']}, normalisation {summary['normalize']}."
    )


def _notes(section: Section) -> list[str]:
    """What limits the comparison of these runs."""
    notes = []
    single = [group.label for group in section.groups if len(group.runs) == 1]
    if single:
        notes.append(f"One run, hence no standard deviation: {', '.join(single)}.")
    parts = [part for run in section.runs for part in run.history]
    if len({(part["git_commit"], part["git_dirty"]) for part in parts}) > 1:
        notes.append("The runs come from different code revisions: see the last table.")
    if any(part["git_dirty"] for part in parts):
        notes.append("Some runs come from code with uncommitted changes: see the last table.")
    if len({part["versions"]["torch"] for part in parts}) > 1:
        notes.append("The runs come from different versions of torch: see the last table.")
    if len({part["device"] for part in parts}) > 1:
        notes.append("The runs come from different devices: their times and memory cannot be compared.")
    folders = list(dict.fromkeys(run.root for run in section.runs if run.settings.get("dataset._target_", "").endswith(".imagefolder")))
    if len(folders) > 1:
        notes.append(f"Their images lay in different folders ({', '.join(folders)}) and are taken for the same by the names of the files.")
    budgets = differing([{key: value for key, value in run.settings.items() if key.startswith("trainer.")} for run in section.runs])
    if budgets[0]:
        values = (f"{key} ({', '.join(dict.fromkeys(budget[key] for budget in budgets))})" for key in budgets[0])
        notes.append(f"Not the same for all runs: {', '.join(values)}. results.csv has every setting of every run.")
    return notes
