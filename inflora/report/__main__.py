"""`python -m inflora.report RUN_OR_MULTIRUN_DIR... --out DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from inflora.report import load, write_loaded
from inflora.report.tables import print_section
from inflora.terminal import tolerate_any_encoding


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report; returns the exit status: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m inflora.report",
        description="Aggregate finished runs over their seeds and write report.html, report.md, results.csv, table.tex and figures. "
        "Runs that differ only in seed, or in what does not change results (output folder, device, tracker, ...), count as "
        "repetitions; runs on other images, with other settings of the data or other weights get a section of their own.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_OR_MULTIRUN_DIR", help="run folders, or folders that hold them at any depth")
    parser.add_argument("--out", default="report", type=Path, metavar="DIR", help="where to write (default: report)")
    parser.add_argument(
        "--reference", metavar="METHOD", help="the method compared with each other one, seed by seed (default: inflora, else the best)"
    )
    options = parser.parse_args(arguments)
    tolerate_any_encoding()
    try:
        loaded = load(options.folders)
        for sentence in loaded.left_out:
            print(sentence, file=sys.stderr)
        methods = sorted({group.method for section in loaded.sections for group in section.groups})
        if options.reference is not None and options.reference not in methods:
            raise ValueError(f"--reference {options.reference}: no run of this method was found; choose one of {', '.join(methods)}")
        path = write_loaded(loaded, options.out, reference=options.reference or "inflora")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for section in loaded.sections:
        print_section(section, Console())
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
