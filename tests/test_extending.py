"""docs/extending.md and examples/my_method: the files on the page are taken from it, installed as the package they are, and used."""

import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import learning
import pytest
import test_methods
import toy
import yaml
from helpers import ROOT, Cli, num_rows, train_py

from inflora.backbone import build_backbone
from inflora.results import read_summary

EXAMPLE = ROOT / "examples" / "my_method"

PAGE = dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.M | re.S))
"""path -> text of each file that is shown."""

RUN = ["method=my_method", "dataset=my_dataset", "trainer.progress=false", "trainer.device=cpu"]


def files_of_example() -> list[Path]:
    made = ("__pycache__", "build", "my_method.egg-info")  # by whoever has installed it from here
    return [path for path in EXAMPLE.rglob("*") if path.is_file() and not set(path.relative_to(EXAMPLE).parts) & set(made)]


def install(source: Path, *options: str, python: str = sys.executable) -> None:
    """Install a package with nothing but what is there: no network, no dependencies, no environment to build in."""
    command = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", *options]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package that the page shows, built by pip into a folder on the path."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    empty = {"my_method/__init__.py": "", "my_method/conf/__init__.py": ""}
    for name, text in (PAGE | empty).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    install(source, "--target", str(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(target)
        yield target


def test_the_page_shows_the_example():
    files = {file.relative_to(EXAMPLE).as_posix(): file.read_text(encoding="utf-8") for file in files_of_example()}
    assert {name: text for name, text in files.items() if text} == PAGE  # the page leaves out empty files
    assert len(PAGE["my_method/method.py"].splitlines()) <= 40


def test_the_page_names_what_exists():
    """Every part, and no file that is not there."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\((\.\./[^)]+)\)", text)}
    assert all(path.exists() for path in linked)
    assert set((ROOT / "inflora" / "parts").glob("[!_]*.py")) <= linked


def test_the_choices_are_listed_with_their_descriptions(installed, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))  # for a process of its own
    lines = [line.split(maxsplit=1) for line in cli("--help").out.splitlines()]
    assert ["method=my_method", "layer norms trained in sequence, held near where each task found them"] in lines
    assert ["dataset=my_dataset", "stripes in 8 directions, in 4 tasks: drawn, no download"] in lines
    assert ["backbone=my_backbone", "a small ViT, untrained"] in lines


# ---- the method --------------------------------------------------------------------------------------------------------------------

METHODS = {
    "my_method": [],
    "two steps": ["method._target_=my_method.two_steps.TwoSteps"],
    "nearest mean": ["method._target_=my_method.nearest_mean.NearestMean"],
}

MOMENTS = {"moment": ["begun", "trained", "ended"]}  # what the contract's tests are parametrised with


def contract() -> Iterator[Any]:
    """Every test of test_methods.py that takes any method, but the one about where the project's own lie."""
    for name, test in vars(test_methods).items():
        parameters = inspect.signature(test).parameters if name.startswith("test_") and callable(test) else ()
        if "case" in parameters and name != "test_every_yaml_says_what_it_is":
            choices = [{"moment": moment} for moment in MOMENTS["moment"]] if "moment" in parameters else [{}]
            for chosen in choices:
                yield pytest.param(functools.partial(test, **chosen), id="-".join([name.removeprefix("test_"), *chosen.values()]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("holds", list(contract()))
def test_the_contract(installed, name: str, holds: Callable[..., None], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if name == "nearest mean":
        monkeypatch.setattr(test_methods, "GROWING", {"my_method"})
    others = {key: request.getfixturevalue(key) for key in inspect.signature(holds).parameters if key not in ("case", "moment")}
    holds(case=["method=my_method", *METHODS[name]], **others)


def test_exactly_the_norms_and_the_head_train(installed):
    method = learning.build(["method=my_method"])
    first, second, _ = toy.sequence()
    learning.learn(method, [first])
    fit = learning.Fit(method, second).begin()
    before = learning.tensors(method)
    fit.train()
    after = learning.tensors(method)
    assert {name for name in learning.changed(before, after) if not re.search(r"\bnorm\d?\.|heads\.1\.", name)} == set()
    assert "backbone.norm.weight" in learning.changed(before, after)


def test_the_penalty_holds_the_norms(installed):
    def moved(strength: int) -> float:
        method = learning.build(["method=my_method", f"method.strength={strength}"])
        fit = learning.Fit(method, toy.sequence()[0]).begin().train(epochs=3)
        return float(fit.method.distance().detach())  # type: ignore[operator]

    assert moved(100) < 0.5 * moved(0)


def test_two_losses_are_two_steps(installed):
    method = learning.build(["method=my_method", *METHODS["two steps"]])
    task = toy.sequence()[0]
    learning.Fit(method, task).begin()
    assert len(list(method.loss(*next(iter(task.batches("train", stream="fit")))))) == 2


def test_a_wrong_value_is_named(installed, cli: Cli, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    said = cli(*RUN, "method.strength=-1", f"output_dir={tmp_path / 'run'}")
    assert said.code == 1
    assert "error: method.strength=-1 is negative; choose 0 (no penalty) or more" in said.err


# ---- the data set and the backbone -------------------------------------------------------------------------------------------------


def test_the_data_set_runs_through_the_command_line(installed, no_report, cli: Cli, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    said = cli(*RUN, f"output_dir={tmp_path / 'run'}")
    assert said.code == 0, said.err
    assert "my_method on my_dataset, my_backbone (random weights: my_vit.first)" in said.err
    assert "applied: recipe/my_dataset_my_method" in said.err
    assert "recipe: chosen by hand" in said.err
    assert num_rows(tmp_path / "run") == 4
    found = read_summary(tmp_path / "run")
    assert found is not None and found["task_aware_accuracy"] > 60


def backbone_of(installed: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((installed / "my_method" / "conf" / "backbone" / f"{name}.yaml").read_text())


def test_the_backbones_build(installed, tmp_path):
    own = build_backbone(**backbone_of(installed, "my_backbone"))
    assert (own.tag, own.image_size, own.model.num_features) == ("my_vit.first", 32, 64)
    assert 150_000 < sum(parameter.numel() for parameter in own.model.parameters()) < 170_000
    timms = build_backbone(**backbone_of(installed, "vit_tiny") | {"pretrained": False})  # its weights would be downloaded
    assert (timms.image_size, timms.model.num_features) == (224, 192)


def test_the_weights_of_the_backbone_lie_beside_it(installed):
    from safetensors.torch import save_file

    name = backbone_of(installed, "my_backbone")["name"]
    state = build_backbone(name, pretrained=False, checkpoint=None).model.state_dict()
    file = installed / "my_method" / "my_vit.safetensors"
    save_file(state, file)
    found = build_backbone(name, pretrained=True, checkpoint=None)
    file.unlink()
    assert found.weights["file"] == "my_vit.safetensors"
    assert all(value.equal(state[key]) for key, value in found.model.state_dict().items())


# ---- for real ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_installed_with_pip_in_a_fresh_environment(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "package")  # building leaves files beside what is built
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (site / "main.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")  # the packages that are here
    install(tmp_path / "package", python=python)

    def train(*arguments: str, module: tuple[str, ...] = ("train.py",)) -> str:
        done = subprocess.run([python, *module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = ("method=my_method", "dataset=my_dataset", "backbone=my_backbone")
    assert all(f"  {name} " in train("--help") for name in listed)
    assert not any(name in train_py("--help").stdout for name in listed), "it is installed there alone"
    matrices = []
    for processes in (1, 2):
        folder = tmp_path / f"run of {processes}"
        train(*RUN, "trainer.epochs=1", f"output_dir={folder}", f"trainer.num_devices={processes}")
        matrices.append((folder / "accuracy_matrix.csv").read_text())
        assert num_rows(folder) == 4
    assert matrices[0] == matrices[1]
    train(str(folder), module=("-m", "inflora.evaluate"))
