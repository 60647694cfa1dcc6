"""A package outside the project brings a method and a data set of its own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import METHODS, ROOT, TINY_VIT, Cli, num_rows
from hydra import compose, initialize_config_dir

from inflora import plugins
from inflora.run import run

METHOD = '''
"""A method from somewhere else."""

from inflora.method import Method


class MyMethod(Method):
    """Nothing but a head that trains."""

    def __init__(self, backbone, *, smoothing):
        super().__init__(backbone)
        if not 0 <= smoothing < 1:
            raise ValueError(f"method.smoothing={smoothing} is out of range; choose 0 up to below 1")
        self.smoothing = smoothing

    def param_groups(self):
        return [{"params": list(self.heads.current.parameters()), "role": "head"}]

    def loss(self, x, y):
        return (1 - self.smoothing) * self.local_cross_entropy(self.features(x), y)
'''

YAML = """\
# a method from somewhere else
_target_: inflora_extras.method.MyMethod
smoothing: 0.1
"""

DATASET = '''
"""Images from somewhere else."""

from toy import tiny


def my_images(root, *, split=None):
    return tiny(root, num_classes=4)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package `inflora_extras`: code, configuration and the entry point in its metadata."""
    files = {
        "inflora_extras/__init__.py": "",
        "inflora_extras/method.py": METHOD,
        "inflora_extras/data.py": DATASET,
        "inflora_extras/conf/__init__.py": "",
        "inflora_extras/conf/method/my_method.yaml": YAML,
        "inflora_extras/conf/dataset/my_images.yaml": (plugins.own_conf() / "dataset" / "digits_5task.yaml")
        .read_text()
        .replace("inflora.data.datasets.digits", "inflora_extras.data.my_images")
        .replace("num_tasks: 5", "num_tasks: 2"),
        "inflora_extras/conf/recipe/my_images_my_method.yaml": "# @package _global_\nmethod:\n  smoothing: 0.2\n",
        "inflora_extras-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: inflora-extras\nVersion: 1.0\n",
        "inflora_extras-1.0.dist-info/entry_points.txt": "[inflora.conf]\nextras = inflora_extras.conf\n",
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.startswith("inflora_extras")]:
        del sys.modules[name]


SMALL = [*TINY_VIT, "trainer.epochs=1", "trainer.progress=false", "trainer.device=cpu"]


def test_without_plugins_there_is_the_project_alone():
    assert plugins.plugin_packages() == []
    assert list(plugins.choices("method")) == METHODS
    assert list(plugins.conf_roots()) == [ROOT / "conf"]


def test_choices_of_a_plugin_come_after_the_projects_own(package):
    assert plugins.plugin_packages() == ["inflora_extras.conf"]
    assert list(plugins.choices("method")) == [*METHODS, "my_method"]
    assert plugins.choices("method")["my_method"] == "a method from somewhere else"
    assert plugins.choices("dataset")["my_images"].startswith("scikit-learn's 1,797 handwritten digits"), "no directive, the first comment"


def test_an_own_choice_is_not_described_by_a_plugin(package):
    (package / "inflora_extras" / "conf" / "method" / "inflora.yaml").write_text("# something else\n")
    assert plugins.choices("method")["inflora"].startswith("InfLoRA (CVPR 2024)")


def test_every_choice_of_the_project_has_a_description():
    for group in ("dataset", "method", "backbone", "optimizer", "scheduler", "trainer", "tracker", "experiment", "debug"):
        found = plugins.choices(group)
        assert found and all(found.values()), found


def test_a_method_and_a_data_set_from_elsewhere_run(package, tmp_path, no_report):
    with initialize_config_dir(str(plugins.own_conf()), version_base="1.3"):
        cfg = compose("config", [f"output_dir={tmp_path / 'run'}", "method=my_method", "dataset=my_images", *SMALL])
    assert cfg.method.smoothing == 0.2, "its own recipe"
    found = run(cfg)
    assert (found["method"], found["dataset"]) == ("method", "my_images")
    assert num_rows(tmp_path / "run") == 2
    cfg.method.smoothing = 1
    cfg.output_dir = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^method.smoothing=1 is out of range; choose 0 up to below 1$"):
        run(cfg)


def test_the_command_line_knows_a_plugin(package, tmp_path, no_report, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(package))  # for a process of its own
    said = cli("method=my_method", "dataset=my_images", *SMALL, f"output_dir={tmp_path / 'run'}")
    assert said.code == 0, said.err
    assert "my_method on my_images, vit_micro" in said.err
    assert "applied: recipe/my_images_my_method" in said.err
    assert num_rows(tmp_path / "run") == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["dataset"]) == ("my_method", "my_images")
    assert "method=my_method " in cli("--help").out


@pytest.mark.parametrize("code", [None, "a mistake", "undefined"])
def test_a_plugin_whose_code_is_gone_or_broken_is_left_out(code, package, monkeypatch, caplog):
    monkeypatch.syspath_prepend(package)
    plugins._is_there.cache_clear()
    if code is not None:
        (package / "inflora_lost" / "conf").mkdir(parents=True)
        for folder in (package / "inflora_lost", package / "inflora_lost" / "conf"):
            (folder / "__init__.py").write_text(code + "\n")
    (package / "inflora_lost-1.0.dist-info").mkdir()
    (package / "inflora_lost-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: inflora-lost\nVersion: 1.0\n")
    (package / "inflora_lost-1.0.dist-info" / "entry_points.txt").write_text("[inflora.conf]\nlost = inflora_lost.conf\n")
    for _ in range(2):
        assert plugins.plugin_packages() == ["inflora_extras.conf"]
    (record,) = caplog.records
    assert record.message.startswith("the plug-in lost is left out: its package inflora_lost.conf cannot be imported")
