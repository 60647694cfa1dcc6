"""Time the hot paths against the plain reference, in turns in one process, and check that both sides agree."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.pairs import BACKBONES, WIDTHS, Bench, Sizes
from benchmarks.timing import Disagreement, Row
from inflora.results import device_name, git_revision, package_versions, peak_memory_bytes
from inflora.run import sound_kernels

_FULL = {"tasks": 5, "epochs": 5, "turns": 5, "run_turns": 1, "learned": (1, 10, 50, 100), "ranks": (1, 10, 50), "widths": (192, 384, 768)}
SIZES = {
    "vit_micro": Sizes(batch_size=64, images=128, width_image_size=64, **_FULL),
    "vit_b16": Sizes(batch_size=128, images=128, width_image_size=224, **_FULL),
    "quick": Sizes(4, 4, tasks=2, epochs=1, turns=1, run_turns=1, learned=(1, 2), ranks=(2,), widths=(192,), width_image_size=32),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons, print the table, and write it with all numbers."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=defaults)
    parser.add_argument("--backbone", choices=BACKBONES, default="vit_micro", help="vit_b16 at 224 pixels is meant for a GPU")
    parser.add_argument("--random", action="store_true", help="random weights, for a backbone whose weights are not on this machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32", "bf16", "16"), default="32", help="of this package; the reference is float32")
    parser.add_argument("--quick", action="store_true", help="seconds: sizes that show the agreement but not the speed")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder for bench.md and bench.json")
    options = vars(parser.parse_args(arguments))
    out, is_quick, is_random = options.pop("out"), options.pop("quick"), options.pop("random")
    sizes = SIZES["quick" if is_quick else options["backbone"]]
    settings = options | {"pretrained": not is_random} | asdict(sizes)
    options |= {"backbone": BACKBONES[options["backbone"]], "pretrained": not is_random}
    head = {"settings": settings, "machine": machine(torch.device(options["device"]))}
    out.mkdir(parents=True, exist_ok=True)

    def keep(result: dict[str, Any]) -> None:
        (out / "bench.json").write_text(json.dumps(head | result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (out / "bench.md").write_text(markdown(head | result), encoding="utf-8")

    with sound_kernels():
        result = measure(sizes, options, keep)
    print(f"{markdown(head | result)}\nWritten to {out}")
    if result["disagreements"]:
        sys.exit("\n".join(result["disagreements"]))


def measure(sizes: Sizes, options: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The rows of the table, the limit, and the tables of growth; what has been measured so far is given to `keep` each time.

    A comparison whose sides disagree is left out and named under `disagreements`.
    """
    bench = Bench(sizes, **options)
    works = [
        bench.images_row,
        bench.covariance_row,
        bench.design_row,
        bench.update_row,
        bench.first_step_row,
        bench.step_row,
        bench.evaluation_row,
        bench.run_row,
    ]
    growths: dict[str, list[dict[str, Any]]] = {"tasks learned": [], "rank": [], "width": []}
    result: dict[str, Any] = {"rows": [], "growth": growths, "disagreements": []}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(works) + 1 + len(sizes.learned) + len(sizes.ranks) + len(sizes.widths))

        def measured(description: str, work: Callable[[], None]) -> None:
            progress.update(bar, description=description)
            try:
                work()
            except Disagreement as error:
                result["disagreements"].append(str(error))
                progress.console.print(str(error), style="red", highlight=False)
            result["peak_memory_bytes"] = peak_memory_bytes(bench.fabric.device)
            keep(result)
            progress.advance(bar)

        def add_row(work: Callable[[], Row]) -> None:
            row = work()
            result["rows"].append(asdict(row))
            progress.console.print(f"{row.name}: {row.ratio:.2f} times faster", highlight=False)

        for work in works:
            measured(work.__name__, partial(add_row, work))
        measured("limit", lambda: result.update(limit=bench.limit()))

        def grow(name: str, value: int, costs: Callable[[], dict[str, Any]]) -> None:
            def add_line() -> None:
                line = {key: asdict(cost) if isinstance(cost, Row) else cost for key, cost in costs().items()}
                growths[name].append({name: value, **line})

            measured(f"{name}: {value}", add_line)

        for learned in sizes.learned:
            grow("tasks learned", learned, lambda learned=learned: bench.growth(learned))
        for rank in sizes.ranks:
            grow("rank", rank, lambda rank=rank: Bench(sizes, **options, rank=rank).growth())
        for width in sizes.widths:
            of_this_width = {"backbone": WIDTHS[width], "pretrained": False, "image_size": sizes.width_image_size}
            grow("width", width, lambda arguments=options | of_this_width: Bench(sizes, **arguments).growth())
    return result


def machine(device: torch.device) -> dict[str, Any]:
    """Where, and with what, the times were taken."""
    versions = package_versions()
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: versions.get(name) for name in ("torch", "torchvision", "timm")},
        **git_revision(),
    }


def markdown(result: dict[str, Any]) -> str:
    """`bench.md`: ratios and times, the limit, growth; of an unfinished benchmark, what there is."""
    lines = ["# Benchmark", "", _listed(result["settings"]), "", _listed(result["machine"]), ""]
    lines += ["| | times faster | in single turns | this package | plain reference | agreement |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        turns = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}, n = {row['turns']}"
        agreement = f"{row['measure']}: {row['difference']:.1e}"
        times = f"{_time(row['fast_s'])} | {_time(row['plain_s'])}"
        lines.append(f"| {row['name']} | **{row['ratio']:.2f}** | {turns} | {times} | {agreement} |")
    if limit := result.get("limit"):
        lines += [
            "",
            f"The limit: a training step has {limit['operations'] / 1e9:.3g} G operations in matrix products and does "
            f"{limit['step_rate'] / 1e9:,.0f} G a second, **{limit['fraction']:.0%}** of the {limit['product_rate'] / 1e9:,.0f} G "
            f"a second of one large product in the same precision: {limit['images_per_second']:,.0f} images a second. Both sides and all "
            f"rows together needed at most {result['peak_memory_bytes'] / 1e9:.2f} GB.",
        ]
    lines += [line for disagreement in result["disagreements"] for line in ("", f"**The sides disagree**: {disagreement}")]
    lines += ["", "What a task costs, this package / plain reference, against the number of tasks learned before, the rank, and the width."]
    for table in filter(None, result["growth"].values()):
        names = list(table[0])
        lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(map(_cell, line.values()))} |" for line in table]
    return "\n".join(lines) + "\n"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_time(value['fast_s'])} / {_time(value['plain_s'])}"
    return " / ".join(f"{number:,}" for number in value) if isinstance(value, tuple) else str(value)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    main()
