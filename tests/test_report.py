"""Reports on synthetic run folders: what is found, how it is grouped, and every number that is written."""

import html
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from inflora import report
from inflora.metrics import summarize
from inflora.report import figures, tables
from inflora.report.__main__ import main
from inflora.report.groups import differing, paired_differences, statistic
from inflora.report.runs import find_runs, read_run


def random_accuracy(task_sizes: list[int], seed: int, loss: float, joint: bool = False) -> np.ndarray:
    """(T, T) fractions that fall by about `loss` per task, as a method's do; joint training fills the last row only."""
    generator = np.random.default_rng(seed)
    num_tasks = len(task_sizes)
    accuracy = np.full((num_tasks, num_tasks), np.nan)
    for task in range(num_tasks):
        drops = np.cumsum(generator.uniform(0.0, 2 * loss, num_tasks - task))
        accuracy[task:, task] = np.clip(generator.uniform(0.8, 0.95) - drops + drops[0], 0.02, 1.0)
    if joint:
        accuracy[:-1] = np.nan
    return accuracy


def weights_of(sixteenth: str, source: str = "timm") -> dict[str, str]:
    return {"source": source, "tensors_sha256": 4 * sixteenth}


def write_run(
    folder: Path,
    *,
    method: str = "inflora",
    seed: int = 0,
    task_sizes: tuple[int, ...] = (2, 2, 2, 2, 2),
    loss: float = 0.05,
    settings: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    finished: bool = True,
) -> Path:
    """A run folder as a training run leaves it.

    Args:
        loss: accuracy lost per task, a fraction.
        settings: entries of the `method` part of config.yaml; `dataset`: of its `dataset` part.
        changes: entries of summary.json that differ from the usual.
    """
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    config = {
        "seed": seed,
        "output_dir": str(folder),
        "resume": "auto",
        "method": {"_target_": f"inflora.methods.{method}", **(settings or {})},
        "dataset": {"root": f"data{seed}", "num_tasks": len(task_sizes), "class_order": "natural", **(dataset or {})},
        "backbone": {"name": "vit_micro"},
        "trainer": {"epochs": 5, "device": "cpu", "precision": "32"},
        "tracker": {"name": "none"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if not finished:
        return folder
    sizes = list(task_sizes)
    accuracy = random_accuracy(sizes, seed, loss, joint=method == "joint")
    counts = [36 * size for size in sizes]
    summary = {
        "method": method,
        "dataset": "digits_5task",
        "backbone": "vit_micro",
        "backbone_tag": "vit_micro",
        "seed": seed,
        "num_tasks": len(sizes),
        "task_sizes": sizes,
        "class_order": list(range(sum(sizes))),
        "test_counts": counts,
        "test_hash": "0123456789abcdef" * 4,
        "split": "stratified(0)",
        "weights": weights_of("fedcba9876543210"),
        "weights_sha256": "0123456789abcdef" * 4,
        "transform": "shift",
        "normalize": "timm",
        **summarize(accuracy, np.minimum(accuracy * 1.05, 1.0), np.minimum(accuracy * 1.02, 1.0), counts),
        "trainable_parameters": 12_288,
        "stored_parameters": 40_000 + 1000 * len(method),
        "total_parameters": 2_700_000,
        "wall_seconds": {"subspace": 1.5, "train": 20.0 + seed, "evaluate": 2.0, "other": 0.5, "total": 24.0 + seed},
        "peak_memory_bytes": 10**8,
        "versions": {"torch": "2.6.0"},
        "git_commit": "a" * 40,
        "git_dirty": False,
        "device": "cpu",
        **(changes or {}),
    }
    part_of_run = ("num_tasks", "device", "git_commit", "git_dirty", "versions")
    summary = {"history": [{name: summary[name] for name in part_of_run}], **summary}
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    header = [f"task_{task}" for task in range(len(sizes))]
    pd.DataFrame(100 * accuracy, columns=header).to_csv(folder / "accuracy_matrix.csv", index=False, float_format="%.6f")
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods on three seeds (joint on two), and one run that did not finish."""
    root = tmp_path_factory.mktemp("multirun")
    for seed in range(3):
        write_run(root / f"method=inflora,seed={seed}", seed=seed, loss=0.03)
        write_run(root / f"method=sequential,seed={seed}", method="sequential", seed=seed, loss=0.09)
        write_run(root / f"method=linear_probe,seed={seed}", method="linear_probe", seed=seed, loss=0.02)
    for seed in range(2):
        write_run(root / f"method=joint,seed={seed}", method="joint", seed=seed, loss=0.001)
    write_run(root / "method=inflora,seed=3", seed=3, finished=False)
    return root


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the report on `sweep`."""
    return report.write([sweep], tmp_path_factory.mktemp("out") / "deep" / "report").parent


def summaries(sweep: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(sweep.glob(f"method={method},*/summary.json"))]


# --- statistics ----------------------------------------------------------------------------------------------------------------------


def test_statistic_is_the_sample_deviation_of_the_defined_values():
    value = statistic([2.0, None, 4.0])
    assert (value.mean, value.n) == (3.0, 2)
    assert value.std == pytest.approx(2**0.5)


def test_statistic_of_one_value_has_no_deviation():
    value = statistic([2.0])
    assert value.mean == 2.0
    assert np.isnan(value.std)


def test_statistic_of_nothing():
    assert statistic([None]).n == 0
    assert tables.statistic_text(statistic([None])) == "–"


def test_differing_settings():
    assert differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]) == [{"b": "2", "c": "absent"}, {"b": "3", "c": "4"}]
    assert differing([{"a": "1"}]) == [{}]


# --- finding and grouping ------------------------------------------------------------------------------------------------------------


def test_seeds_are_repetitions_and_groups_are_ranked(sweep: Path):
    loaded = report.load([sweep])
    (section,) = loaded.sections
    assert section.title == "digits_5task, vit_micro"
    assert {group.label: [run.summary["seed"] for run in group.runs] for group in section.groups} == {
        "joint": [0, 1],
        "linear_probe": [0, 1, 2],
        "inflora": [0, 1, 2],
        "sequential": [0, 1, 2],
    }
    means = [group.statistic("last_accuracy").mean for group in section.groups]
    assert means == sorted(means, reverse=True)


def test_group_statistics_are_those_of_the_summaries(sweep: Path):
    (section,) = report.load([sweep]).sections
    group = next(group for group in section.groups if group.label == "inflora")
    values = [summary["forgetting"] for summary in summaries(sweep, "inflora")]
    assert group.statistic("forgetting").mean == pytest.approx(np.mean(values))
    assert group.statistic("forgetting").std == pytest.approx(np.std(values, ddof=1))


def test_unfinished_run_is_named_and_left_out(sweep: Path):
    assert report.load([sweep]).left_out == [f"{sweep / 'method=inflora,seed=3'} is unfinished (no summary.json): left out."]


def test_a_folder_given_twice_counts_once(sweep: Path):
    run = sweep / "method=inflora,seed=0"
    assert len(find_runs([run, sweep, run])[0]) == 11


def recipe_of(last: float | None, average: float | None, *changes: str) -> dict[str, Any]:
    """`published` of a summary."""
    figures = {"figures": None, "last_accuracy": last, "average_accuracy": average}
    return {"source": "A et al.", **figures, "differs": ["other weights", "one seed"], "changes": list(changes)}


def test_published_accuracy_stands_beside_that_of_the_runs(tmp_path: Path):
    for seed, changes in enumerate([["trainer.epochs=1"], ["trainer.epochs=1", "trainer.batch_size=8"]]):
        write_run(tmp_path / f"a{seed}", method="lae", seed=seed, changes={"published": recipe_of(70.5, None, *changes)})
    write_run(tmp_path / "a2", method="lae", seed=2)  # of a version that recorded nothing of the kind
    write_run(tmp_path / "b", method="ewc", changes={"published": recipe_of(None, None)})
    write_run(tmp_path / "c", changes={"published": None})
    (section,) = report.load([tmp_path]).sections
    table = tables.published_table(section)
    assert table is not None
    (group,) = (group for group in section.groups if group.method == "lae")
    reached = [tables.statistic_text(group.statistic(name)) for name in ("last_accuracy", "average_accuracy")]
    typed = "trainer.epochs=1, trainer.batch_size=8"
    assert table.rows == [["lae", reached[0], "70.50", reached[1], "–", "A et al.", "other weights; one seed", typed]]
    page = report.write([tmp_path], tmp_path / "report")
    assert "published" not in pd.read_csv(tmp_path / "report" / "results.csv").columns
    assert table.caption in page.read_text() and table.caption in page.with_suffix(".md").read_text()


def test_where_nothing_was_published_there_is_no_table(sweep: Path):
    (section,) = report.load([sweep]).sections
    assert tables.published_table(section) is None


def test_other_settings_of_a_method_are_another_group_named_by_them(tmp_path: Path):
    for rank in (4, 10):
        write_run(tmp_path / f"rank={rank}", settings={"rank": rank})
    write_run(tmp_path / "sequential", method="sequential", settings={"rank": 4, "scale": 1.0})
    (section,) = report.load([tmp_path]).sections
    assert {group.label for group in section.groups} == {"inflora (method.rank=4)", "inflora (method.rank=10)", "sequential"}
    table = tables.settings_table(section)
    assert table is not None
    assert sorted(table.rows) == [["inflora (method.rank=10)", "method.rank", "10"], ["inflora (method.rank=4)", "method.rank", "4"]]


def test_many_differing_settings_are_numbered_and_listed(tmp_path: Path):
    for number in range(2):
        write_run(tmp_path / str(number), settings={f"a_rather_long_setting_{name}": number for name in "abc"})
    (section,) = report.load([tmp_path]).sections
    assert {group.label for group in section.groups} == {"inflora [1]", "inflora [2]"}
    table = tables.settings_table(section)
    assert table is not None
    assert len(table.rows) == 6


def test_where_and_on_what_a_run_ran_does_not_matter(tmp_path: Path):
    write_run(tmp_path / "a", seed=0)
    run = write_run(tmp_path / "b", seed=1)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"] |= {"device": "cuda", "num_devices": 2, "grad_accumulation": 4}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"tracker": {"name": "wandb", "project": "p"}}))
    (section,) = report.load([tmp_path]).sections
    assert [len(group.runs) for group in section.groups] == [2]


def test_precisions_are_apart(tmp_path: Path):
    for precision in ("32", "bf16"):
        run = write_run(tmp_path / precision)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["trainer"]["precision"] = precision
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    (section,) = report.load([tmp_path]).sections
    assert {group.label for group in section.groups} == {"inflora (trainer.precision=32)", "inflora (trainer.precision=bf16)"}


@pytest.mark.parametrize(
    ("difference", "title"),
    [
        ({"dataset": {"max_train_per_class": 100}}, "digits_5task, vit_micro (dataset.max_train_per_class=100)"),
        ({"changes": {"test_hash": "f" * 64}}, "digits_5task, vit_micro (test_hash=ffffffffffff)"),
        ({"changes": {"weights": weights_of("f" * 16)}}, "digits_5task, vit_micro (weights=ffffffffffff)"),
        ({"changes": {"dataset": "cifar100_10task"}}, "cifar100_10task, vit_micro"),
        ({"task_sizes": (4, 6)}, "digits_5task, vit_micro (dataset.num_tasks=2)"),
    ],
)
def test_other_data_or_weights_are_another_section(tmp_path: Path, difference: dict[str, Any], title: str):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="sequential", **difference)
    sections = report.load([tmp_path]).sections
    assert len(sections) == 2
    assert sections[1].title == title
    assert [group.label for section in sections for group in section.groups] == ["inflora", "sequential"]


@pytest.mark.parametrize(
    "different, titles",
    [
        ("train_hash", ("(images=flowers)", "(images=birds)")),
        ("weights", ("(weights=000000000000)", "(weights=111111111111)")),
    ],
)
def test_own_data_sets_are_called_by_their_folders(different: str, titles: tuple[str, str], tmp_path: Path):
    for number, name in enumerate(("flowers", "birds")):
        other = weights_of(f"{number}" * 16) if different == "weights" else f"{number}" * 64
        run = write_run(tmp_path / name, changes={"dataset": "imagefolder", different: other})
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["dataset"]["root"] = f"data/{name}"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert {section.title for section in report.load([tmp_path]).sections} == {f"imagefolder, vit_micro {title}" for title in titles}


def test_other_training_images_are_no_repetition(tmp_path: Path):
    write_run(tmp_path / "a", changes={"train_hash": "0" * 64})
    write_run(tmp_path / "b", changes={"train_hash": "1" * 64})
    loaded = report.load([tmp_path])
    assert [section.title for section in loaded.sections] == [f"digits_5task, vit_micro (train_hash={digit * 12})" for digit in "01"]
    assert loaded.left_out == []


def test_long_settings_are_short_in_titles_and_stay_apart(tmp_path: Path):
    orders = [list(range(100)), [1, 0, *range(2, 100)]]
    for number, order in enumerate(orders):
        write_run(tmp_path / str(number), dataset={"class_order": order})
    titles = [section.title for section in report.load([tmp_path]).sections]
    assert len(set(titles)) == 2
    assert all(len(title) < 90 for title in titles)


def test_a_whole_number_is_the_same_setting_in_either_spelling(tmp_path: Path):
    write_run(tmp_path / "a", seed=0, settings={"threshold_end": 1.0, "scale": 0.5})
    write_run(tmp_path / "b", seed=1, settings={"threshold_end": 1, "scale": 0.5})
    (section,) = report.load([tmp_path]).sections
    (group,) = section.groups
    assert group.runs[0].settings["method.threshold_end"] == "1"
    assert group.runs[0].settings["method.scale"] == "0.5"


def test_a_continued_sequence_is_no_repetition_of_one_planned_whole(tmp_path: Path):
    part = {"device": "cpu", "git_commit": "a" * 40, "git_dirty": False, "versions": {"torch": "2.6.0"}}
    write_run(tmp_path / "a", seed=0, changes={"history": [{"num_tasks": 2, **part}, {"num_tasks": 5, **part}]})
    write_run(tmp_path / "b", seed=1, changes={"history": [{"num_tasks": 5, **part}, {"num_tasks": 5, **part, "device": "gpu"}]})
    write_run(tmp_path / "c", seed=2)
    (section,) = report.load([tmp_path]).sections
    assert {group.label: len(group.runs) for group in section.groups} == {
        "inflora (planned_tasks=2, 5)": 1,
        "inflora (planned_tasks=5)": 2,
    }


def test_seeds_of_random_weights_are_one_group(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, changes={"weights": weights_of(f"{seed}" * 16, "random")})
    (section,) = report.load([tmp_path]).sections
    assert [len(group.runs) for group in section.groups] == [2]


def test_a_repeated_seed_counts_once_and_is_named(tmp_path: Path):
    write_run(tmp_path / "2025-01-01")
    write_run(tmp_path / "2025-01-02")
    loaded = report.load([tmp_path])
    assert [run.path.name for run in loaded.sections[0].runs] == ["2025-01-02"]
    assert loaded.left_out == [f"{tmp_path / '2025-01-01'} is repeated by {tmp_path / '2025-01-02'}: left out."]


def test_of_a_repeated_run_the_one_that_ended_last_counts_whatever_it_is_called(tmp_path: Path):
    for name, ended in (("new", 2000), ("old", 1000)):
        os.utime(write_run(tmp_path / name) / "summary.json", (ended, ended))
    assert [run.path.name for run in report.load([tmp_path]).sections[0].runs] == ["new"]


def test_a_run_that_is_named_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    loaded = report.load([tmp_path, Path("a"), Path(".")])
    assert [len(group.runs) for group in loaded.sections[0].groups] == [1] and loaded.left_out == []


def test_images_in_different_folders_are_told(tmp_path: Path):
    for seed, target in ((0, "imagefolder"), (1, "imagefolder")):
        write_run(tmp_path / str(seed), seed=seed, dataset={"_target_": f"inflora.data.datasets.{target}"})  # its root is data{seed}
    text = (report.write([tmp_path], tmp_path / "out").parent / "report.md").read_text()
    assert "Their images lay in different folders (data0, data1) and are taken for the same by the names of the files." in text


def test_records_of_a_part_that_lack_something_are_left_out(tmp_path: Path):
    write_run(tmp_path / "good")
    write_run(tmp_path / "other", changes={"history": [{"num_tasks": 5, "device": "cpu", "git_commit": None, "git_dirty": None}]})
    assert report.load([tmp_path]).left_out == [f"{tmp_path / 'other'} has no versions in its summary.json: left out."]


def test_unreadable_runs_are_left_out_with_the_reason(tmp_path: Path):
    write_run(tmp_path / "good")
    broken = write_run(tmp_path / "broken")
    (broken / "summary.json").write_text('{"method": ')
    old = write_run(tmp_path / "old")
    summary = json.loads((old / "summary.json").read_text())
    del summary["forgetting"], summary["test_hash"]
    (old / "summary.json").write_text(json.dumps(summary))
    wrong = write_run(tmp_path / "wrong", changes={"num_tasks": 4})
    broken_line, old_line, wrong_line = report.load([tmp_path]).left_out
    assert broken_line.startswith(f"{broken} cannot be read (Expecting value")
    assert old_line == f"{old} has no test_hash, forgetting in its summary.json: left out."
    assert wrong_line == f"{wrong} has 4 tasks but an accuracy_matrix.csv of 5 x 5: left out."


def test_no_finished_run_is_an_error(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"no finished run in .*: give the folders of finished runs, or one above them\. There is no folder"
    ):
        report.load([tmp_path])
    write_run(tmp_path / "a", finished=False)
    with pytest.raises(ValueError, match=r"is unfinished \(no summary.json\): left out\."):
        report.load([tmp_path])


def test_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder: give run folders, or folders that hold them"):
        report.load([tmp_path / "nowhere"])


def test_matrix_is_read_as_it_was_measured(sweep: Path):
    run = read_run(sweep / "method=joint,seed=0")
    assert np.isnan(run.accuracy[:-1]).all()
    assert run.accuracy[-1] @ run.summary["test_counts"] / sum(run.summary["test_counts"]) == pytest.approx(run.summary["last_accuracy"])


# --- paired differences --------------------------------------------------------------------------------------------------------------


def test_differences_pair_equal_seeds(sweep: Path):
    (section,) = report.load([sweep]).sections
    differences = {difference.other.label: difference for difference in paired_differences(section, "inflora")}
    assert set(differences) == {"joint", "linear_probe", "sequential"}
    ours, theirs = summaries(sweep, "inflora"), summaries(sweep, "sequential")
    expected = [a["last_accuracy"] - b["last_accuracy"] for a, b in zip(ours, theirs, strict=True)]
    assert differences["sequential"].last_accuracy == pytest.approx(expected)
    assert len(differences["joint"].last_accuracy) == 2
    assert differences["joint"].forgetting == []


def test_difference_needs_the_same_class_order(tmp_path: Path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="sequential", changes={"class_order": list(range(10))[::-1]})
    (section,) = report.load([tmp_path]).sections
    assert paired_differences(section, "inflora") == []
    assert tables.differences_table(section, "inflora") is None


def test_reference_defaults_to_the_best_group(sweep: Path):
    (section,) = report.load([sweep]).sections
    assert {difference.reference.label for difference in paired_differences(section, "sequential")} == {"sequential"}
    assert {difference.reference.label for difference in paired_differences(section, "unknown")} == {section.groups[0].label}


# --- written files -------------------------------------------------------------------------------------------------------------------


def test_all_files_are_written(written: Path):
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    drawn = ["accuracy_curve", "forgetting_per_task", "accuracy_and_storage", "wall_time"]
    drawn += [f"accuracy_matrix_{method}" for method in ("inflora", "joint", "linear_probe", "sequential")]
    assert names == {"report.md", "report.html", "results.csv", "table.tex"} | {f"figures/{n}.{e}" for n in drawn for e in ("png", "svg")}


def test_results_have_one_row_per_run(written: Path, sweep: Path):
    frame = pd.read_csv(written / "results.csv")
    assert len(frame) == 11
    assert not frame["run"].duplicated().any()
    row = frame[(frame["label"] == "sequential") & (frame["seed"] == 2)].iloc[0]
    summary = summaries(sweep, "sequential")[2]
    assert row["last_accuracy"] == pytest.approx(summary["last_accuracy"])
    assert row["wall_seconds_total"] == 26.0
    assert json.loads(row["class_order"]) == list(range(10))
    assert frame.loc[frame["label"] == "joint", "forgetting"].isna().all()


def test_markdown_has_the_table_and_its_figures(written: Path, sweep: Path):
    text = (written / "report.md").read_text()
    last = [summary["last_accuracy"] for summary in summaries(sweep, "inflora")]
    row = next(line for line in text.splitlines() if line.startswith("| inflora | 3 |"))
    assert f"| {np.mean(last):.2f} ± {np.std(last, ddof=1):.2f} |" in row
    assert row.endswith("| 12.3 k | 47 k | 100 MB | 25.0 s |")
    joint = next(line for line in text.splitlines() if line.startswith("| joint | 2 |"))
    assert joint.count("| – ") == 3  # average, forgetting, backward transfer
    assert "seed=3 is unfinished (no summary.json): left out." in text
    links = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(links) == 8
    assert all((written / link).is_file() for link in links)


class _Page(HTMLParser):
    """Collects tags, attributes and text; notices tags left open."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_whole_and_self_contained(written: Path):
    source = (written / "report.html").read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert sum(tag == "svg" for tag, _ in page.tags) == 8
    outside = [attrs[name] for tag, attrs in page.tags for name in ("src", "href", "xlink:href") if tag != "svg" and attrs.get(name)]
    assert all(str(link).startswith(("#", "data:")) for link in outside)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert figures.INK not in source[source.index("<svg") :]
    for text in ("inflora", "sequential", "joint", "seed=3 is unfinished", "last, inflora higher"):
        assert text in page.text


MEASURE = """
<script>
onload = () => {
  const page = frames[0].document, style = (element) => frames[0].getComputedStyle(element);
  const report = {
    width: page.documentElement.scrollWidth,
    figures: [...page.querySelectorAll(".figures svg")].map((svg) => svg.getBoundingClientRect().width),
    paper: style(page.body).backgroundColor,
    ink: style(page.body).color,
    drawn: [...new Set([...page.querySelectorAll("svg text")].map((text) => style(text).fill))],
  };
  document.body.innerHTML = `<pre>${JSON.stringify(report)}</pre>`;
};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "paper"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(20, 25, 31)")], ids=["light", "dark"])
def test_html_on_a_phone_in_a_real_browser(written: Path, tmp_path: Path, scheme: str, paper: str):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine")
    frame = f'<iframe width="390" height="800" srcdoc="{html.escape((written / "report.html").read_text())}"></iframe>{MEASURE}'
    (tmp_path / "frame.html").write_text(frame)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    command = [browser, *options, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    seen = json.loads(dom[dom.index("<pre>") + 5 : dom.index("</pre>")])
    assert seen["width"] <= 390  # tables scroll inside the page; the page itself does not
    assert len(seen["figures"]) == 8
    assert all(300 < width < 390 for width in seen["figures"])
    assert seen["paper"] == paper
    assert seen["ink"] in seen["drawn"]
    assert set(seen["drawn"]) <= {seen["ink"], "rgb(0, 0, 0)", "rgb(255, 255, 255)"}  # the numbers in heat maps suit their cells


def test_html_escapes_what_users_type(tmp_path: Path):
    for value in ("<b>x</b>", "y"):
        write_run(tmp_path / value[-1], settings={"note": value}, changes={"dataset": "a<b&c"})
    source = report.write([tmp_path], tmp_path / "out").read_text()
    assert "<b>x</b>" not in source
    assert "inflora (method.note=&lt;b&gt;x&lt;/b&gt;)" in source
    page = _Page()
    page.feed(source)
    assert page.open == []


def test_latex_cells_are_text():
    assert tables._latex_cell("<|>") == r"\textless{}\textbar{}\textgreater{}"
    assert tables._latex_cell("a_b^2~{5 % & #1 $ \\ 1 ± 2, −3 –") == (
        r"a\_b\textasciicircum{}2\textasciitilde{}\{5 \% \& \#1 \$ \textbackslash{} 1 $\pm$ 2, $-$3 --"
    )


def test_markdown_cells_are_text():
    assert tables.markdown_text("sd_lora alignment._target_ _x_ a|b *c* <b> `d`") == (
        r"sd_lora alignment.\_target\_ \_x\_ a\|b \*c\* \<b> \`d\`"
    )


def test_latex_table_is_booktabs_with_escaped_names(written: Path):
    text = (written / "table.tex").read_text()
    lines = text.splitlines()
    assert lines[lines.index(r"\midrule") + 1].startswith("joint & 2 & ")
    assert r"linear\_probe & 3 & " in text
    assert r"$\pm$" in text
    assert "_" not in text.replace(r"\_", "")
    assert text.isascii()
    assert r"\begin{tabular}{lrrrrrrrrrrr}" in lines
    assert {line.count("&") for line in lines if line.endswith(r" \\")} == {11}


def test_svg_follows_the_text_and_repeats_exactly(sweep: Path, written: Path, tmp_path: Path):
    again = report.write([sweep], tmp_path).parent
    for path in sorted((written / "figures").glob("*.svg")):
        assert path.read_text() == (again / "figures" / path.name).read_text()
    assert figures.INK in (written / "figures" / "accuracy_curve.svg").read_text()


def test_sections_keep_their_figures_apart(tmp_path: Path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", task_sizes=(1, 4, 2), changes={"dataset": "uneven"})
    out = report.write([tmp_path], tmp_path / "out").parent
    assert {path.stem for path in (out / "figures").glob("*_accuracy_curve.png")} == {"0_accuracy_curve", "1_accuracy_curve"}
    assert "3 tasks of 1, 4, 2 classes" in (out / "report.md").read_text()


def test_single_task_and_single_run(tmp_path: Path):
    write_run(tmp_path / "run", task_sizes=(10,))
    out = report.write([tmp_path / "run"], tmp_path / "run" / "report").parent
    text = (out / "report.md").read_text()
    assert "1 task of 10 classes" in text
    assert "One run, hence no standard deviation: inflora." in text
    assert not (out / "figures" / "forgetting_per_task.png").exists()
    assert "±" not in next(line for line in text.splitlines() if line.startswith("| inflora"))


def test_joint_alone(tmp_path: Path):
    write_run(tmp_path / "run", method="joint")
    out = report.write([tmp_path], tmp_path / "out").parent
    assert (out / "figures" / "accuracy_curve.png").exists()
    assert not (out / "figures" / "forgetting_per_task.png").exists()


NOT_COMPARABLE = (
    "The runs come from different code revisions: see the last table.",
    "Some runs come from code with uncommitted changes: see the last table.",
    "The runs come from different versions of torch: see the last table.",
    "The runs come from different devices: their times and memory cannot be compared.",
)


def test_notes_warn_of_what_cannot_be_compared(tmp_path: Path):
    write_run(tmp_path / "a")
    changes = {"git_commit": None, "git_dirty": True, "device": "NVIDIA H100", "versions": {"torch": "2.11.0"}}
    write_run(tmp_path / "b", method="sequential", changes=changes)
    text = (report.write([tmp_path], tmp_path / "out").parent / "report.md").read_text()
    assert all(sentence in text for sentence in NOT_COMPARABLE)
    assert "| unknown, changed | 2.11.0 | NVIDIA H100 |" in text


def test_every_part_of_a_resumed_run_is_told(tmp_path: Path):
    parts = [
        {"num_tasks": 5, "device": "NVIDIA H100", "git_commit": "b" * 40, "git_dirty": True, "versions": {"torch": "2.11.0"}},
        {"num_tasks": 5, "device": "cpu", "git_commit": "a" * 40, "git_dirty": False, "versions": {"torch": "2.6.0"}},
    ]
    write_run(tmp_path / "a", changes={"history": parts})
    text = (report.write([tmp_path], tmp_path / "out").parent / "report.md").read_text()
    assert all(sentence in text for sentence in NOT_COMPARABLE)
    assert "| bbbbbbbbb, changed, aaaaaaaaa | 2.11.0, 2.6.0 | NVIDIA H100, cpu |" in text


def test_different_budgets_are_told_and_every_setting_is_in_the_results(tmp_path: Path):
    write_run(tmp_path / "a", settings={"rank": 10})
    run = write_run(tmp_path / "b", method="sequential")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"] |= {"epochs": 20, "device": "cuda"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = report.write([tmp_path], tmp_path / "out").parent
    assert (
        "Not the same for all runs: trainer.epochs (5, 20). results.csv has every setting of every run." in (out / "report.md").read_text()
    )
    frame = pd.read_csv(out / "results.csv", index_col="method")
    assert frame["trainer.epochs"].to_dict() == {"inflora": 5, "sequential": 20}
    assert frame.loc["inflora", "method.rank"] == 10 and np.isnan(frame.loc["sequential", "method.rank"])


# --- figures -------------------------------------------------------------------------------------------------------------------------


def test_curve_shows_mean_and_band(sweep: Path):
    (section,) = report.load([sweep]).sections
    (axes,) = figures.accuracy_curve(section).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    curves = np.array([summary["accuracy_curve"] for summary in summaries(sweep, "inflora")])
    assert np.asarray(lines["inflora"].get_xdata()).tolist() == [2, 4, 6, 8, 10]
    assert np.asarray(lines["inflora"].get_ydata()) == pytest.approx(curves.mean(axis=0))
    band = axes.collections[[group.label for group in section.groups].index("inflora")].get_paths()[0].vertices
    assert np.asarray(band)[:, 1].max() == pytest.approx((curves.mean(axis=0) + curves.std(axis=0, ddof=1)).max())


def test_heat_map_shows_the_mean_matrix(sweep: Path):
    (section,) = report.load([sweep]).sections
    group = next(group for group in section.groups if group.label == "sequential")
    axes = figures.accuracy_matrix(section, group).axes[0]
    mean = np.mean([run.accuracy for run in group.runs], axis=0)
    assert [text.get_text() for text in axes.texts[1:4]] == [f"{mean[i, j]:.0f}" for i, j in ((0, 0), (1, 0), (1, 1))]


def drawn_texts(figure: Figure) -> list[Text]:
    """Every text of a figure, without the labels that matplotlib keeps for ticks outside the axes."""
    hidden = []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        hidden += [label for place, label in ticks if not low <= place <= high]
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in texts if text.get_text() and text.get_visible() and text not in hidden]


@pytest.fixture(scope="module")
def long_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven groups whose labels are as long as labels may be."""
    root = tmp_path_factory.mktemp("long names")
    for rank in range(7):
        write_run(root / str(rank), method="sequential_full", settings={"rank": 100 + rank, "scale": 0.006 + rank})
    return root


@pytest.mark.parametrize("runs", ["sweep", "long_names"])
def test_no_text_of_a_figure_covers_another(runs: str, request: pytest.FixtureRequest):
    (section,) = report.load([request.getfixturevalue(runs)]).sections
    for name, figure in figures.figures_of(section):
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
        for number, (text, box) in enumerate(boxes):
            covered = [other for other, other_box in boxes[number + 1 :] if box.overlaps(other_box)]
            assert not covered, f"{name}: {text!r} covers {covered}"
            assert box.x0 >= 0, f"{name}: {text!r} is cut off"
            assert box.x1 <= figure.bbox.width, f"{name}: {text!r} is cut off"


# --- terminal ------------------------------------------------------------------------------------------------------------------------


def test_command_line(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(sweep), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "linear_probe" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out.replace("\n", "")
    assert err == f"{sweep / 'method=inflora,seed=3'} is unfinished (no summary.json): left out.\n"


def test_an_unknown_reference_is_an_error(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(sweep), "--out", str(tmp_path / "out"), "--reference", "sequental"]) == 1
    said = capsys.readouterr().err
    assert "--reference sequental: no run of this method was found; choose one of inflora, joint, linear_probe, sequential" in said
    assert main([str(sweep), "--out", str(tmp_path / "out"), "--reference", "sequential"]) == 0
    assert "last, sequential higher" in (tmp_path / "out" / "report.md").read_text()


def test_labels_with_brackets_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for blocks in ("[k]", "[v]"):
        write_run(tmp_path / blocks, settings={"parts": blocks})
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "inflora (method.parts=[v])" in capsys.readouterr().out


def test_command_line_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (f"error: {tmp_path / 'nowhere'} is not a folder: give run folders, or folders that hold them.\n")
    assert not (tmp_path / "out").exists()


def test_command_line_without_torch(sweep: Path, tmp_path: Path):
    code = "import sys; sys.modules['torch'] = None; from inflora.report.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, str(sweep / "method=inflora,seed=0"), "--out", str(tmp_path)]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parent.parent, capture_output=True)
    assert (tmp_path / "report.html").exists()


def test_table_of_one_run(sweep: Path):
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_table(summaries(sweep, "inflora")[1], console)
    text = console.export_text()
    summary = summaries(sweep, "inflora")[1]
    assert "digits_5task, vit_micro, inflora, seed 1" in text
    assert f"{summary['last_accuracy']:.2f}" in text
    assert "25.0 s (subspace 1.5 s, train 21.0 s, evaluate 2.0 s, other 0.5 s)" in text


@pytest.mark.parametrize("figures, said", [((70.5, 80.25), True), ((None, None), False)])
def test_table_of_one_run_has_what_was_published(figures: tuple[float | None, float | None], said: bool, sweep: Path):
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_table(summaries(sweep, "inflora")[1] | {"published": recipe_of(*figures, "dataset.task_sizes=[2,2]")}, console)
    text = " ".join(console.export_text().split())
    assert "recipe A et al." in text and "otherwise there other weights; one seed" in text
    assert ("published last 70.50, average 80.25" in text) == said
    assert ("changed here dataset.task_sizes=[2,2]" in text) == said


def test_table_of_one_run_says_why_a_number_is_missing(sweep: Path):
    console = Console(record=True, width=140, file=io.StringIO())
    report.print_table(summaries(sweep, "joint")[0], console)
    assert "– (the model was tested only after its last stage)" in console.export_text()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (12_288, "12.3 k"), (999_600, "1 M"), (86_567_656, "86.6 M")]
)
def test_count_text(count: int, text: str):
    assert tables.count_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (120, "2.0 min"), (9000, "2.5 h")])
def test_duration_text(seconds: float, text: str):
    assert tables.duration_text(seconds) == text


def test_negative_numbers_have_a_minus_sign():
    assert tables.percent_text(-1.5) == "−1.50"
    assert tables.statistic_text(statistic([1.0, 2.0]), sign=True) == "+1.50 ± 0.71"
