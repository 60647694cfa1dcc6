"""Reports from run folders: aggregate over seeds, statistics, tables, figures, HTML. Needs neither torch nor a GPU.

    from inflora import report
    report.write(["outputs/digits_5task"], "report")

For a notebook, `load` gives the sections, and `tables` and `figures` have one function per table and figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inflora.report import figures, page, tables
from inflora.report.groups import Section, sections_of
from inflora.report.runs import find_runs
from inflora.report.tables import print_table, published_rows

__all__ = ["Loaded", "load", "print_table", "published_rows", "write", "write_loaded"]


@dataclass(frozen=True)
class Loaded:
    """The comparable runs, and one sentence for each run folder that was left out."""

    sections: list[Section]
    left_out: list[str]


def load(run_dirs: Sequence[str | Path]) -> Loaded:
    """Read and group every finished run in or below the given folders.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if no finished run is found.
    """
    runs, unreadable = find_runs(run_dirs)
    sections, repeated = sections_of(runs)
    return Loaded(sections, unreadable + repeated)


def write(run_dirs: Sequence[str | Path], out_dir: str | Path) -> Path:
    """Write the report on every finished run in or below the given folders; return the path of report.html.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if no finished run is found.
    """
    return write_loaded(load(run_dirs), Path(out_dir))


def write_loaded(loaded: Loaded, out_dir: Path, *, reference: str = "inflora") -> Path:
    """Write report.md, report.html, results.csv, table.tex and figures/ into `out_dir`; return the path of report.html.

    Args:
        reference: the method that the others are compared with, seed by seed.
    """
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    parts = []
    for number, section in enumerate(loaded.sections):
        prefix = f"figures/{number}_" if len(loaded.sections) > 1 else "figures/"
        drawn = {prefix + name: figures.save(figure, out_dir / (prefix + name)) for name, figure in figures.figures_of(section)}
        parts.append(page.part_of(section, reference, drawn))
    texts = {
        "report.md": page.to_markdown_page(parts, loaded.left_out),
        "report.html": page.to_html_page(parts, loaded.left_out),
        "results.csv": tables.runs_frame(loaded.sections).to_csv(index=False, lineterminator="\n"),
        "table.tex": "\n".join(tables.to_latex(section) for section in loaded.sections),
    }
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8")
    return out_dir / "report.html"
