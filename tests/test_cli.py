"""The command line: help, faults in one sentence, sweeps, stopping.

Everything is tried in this process and, in the slow tier, again through `python train.py`.
"""

import contextlib
import errno
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import METHODS, TINY_VIT, Cli, Said, files_of, num_rows, train_py
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from inflora import plugins
from inflora.cli import _continuing, _program, changes, quoted
from inflora.run_folder import hold
from inflora.terminal import tolerate_any_encoding

pytestmark = pytest.mark.usefixtures("no_report")

QUICK = [*TINY_VIT, "method=linear_probe", "debug=default", "dataset.num_tasks=2", "trainer.progress=false", "trainer.device=cpu"]
"""A run of seconds: digits in two tasks, one epoch on eight images a class."""


def fault(said: Said) -> str:
    """The one sentence of a command line that failed."""
    assert said.code == 1, said
    assert "Traceback" not in said.err + said.out
    assert said.err.count("error:") == 1, said.err
    return said.err[said.err.index("error: ") + len("error: ") :].strip()


# ---- help --------------------------------------------------------------------------------------------------------------------------


def test_help_lists_every_choice_with_a_description(cli: Cli):
    said = cli("--help")
    assert said.code == 0 and said.err == ""
    for group in ("dataset", "method", "backbone", "optimizer", "scheduler", "trainer", "tracker", "experiment", "debug"):
        for name, description in plugins.choices(group).items():
            (line,) = [line for line in said.out.splitlines() if line.split()[:1] == [f"{group}={name}"]]
            assert line.split(maxsplit=1)[1] == description
    assert "usage: python train.py" in said.out and "--traceback" in said.out and "--cfg job" in said.out
    assert cli("-h") == said


@pytest.mark.parametrize("arguments", ["--cfg job method=sequential seed=7", "method=sequential --cfg job seed=7"])
def test_the_composed_configuration_is_shown(cli: Cli, arguments: str):
    said = cli(*arguments.split())
    assert said.code == 0
    shown = yaml.safe_load(said.out)
    assert shown["seed"] == 7 and shown["method"]["_target_"] == "inflora.methods.sequential.Sequential"


# ---- a run -------------------------------------------------------------------------------------------------------------------------


def test_a_run_and_its_rerun(cli: Cli, tmp_path: Path):
    folder = tmp_path / "run"
    said = cli(*QUICK, f"output_dir={folder}", "seed=3")
    assert said.code == 0, said.err
    assert "linear_probe on digits_5task, vit_micro (random weights: test_vit.r160_in1k)" in said.err
    assert {path.name for path in folder.iterdir()} - {"report"} == {
        ".hydra", ".lock", "accuracy_matrix.csv", "checkpoints", "config.yaml", "metrics.jsonl", "run.log", "summary.json",
        "task_aware_matrix.csv",
    }  # fmt: skip
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())[-1] == "seed=3"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["dataset"], summary["backbone"]) == ("linear_probe", "digits_5task", "vit_micro")
    assert (summary["seed"], summary["num_tasks"]) == (3, 2)
    assert f"{summary['last_accuracy']:.2f}" in said.out
    assert str(folder / "report" / "report.html") in said.out.replace("\n", "")

    before = files_of(folder)
    again = cli(*QUICK, f"output_dir={folder}", "seed=3")
    assert again.code == 0
    assert files_of(folder) == before
    assert "This run is finished" in again.out and f"{summary['last_accuracy']:.2f}" in again.out

    assert "dataset.num_tasks" not in fault(other := cli(*QUICK, f"output_dir={folder}", "seed=4"))
    assert "differs in seed (3 there, 4 here); choose another output_dir" in other.err
    assert files_of(folder) == before


def test_configuration_of_ones_own_is_used_and_recorded(cli: Cli, tmp_path: Path):
    """From a folder named with `--config-dir`: a recipe, found by name, and a schedule under a name of its own."""
    mine = tmp_path / "mine"
    for name, text in {
        "method/mine.yaml": "defaults: [linear_probe]\n",
        "recipe/digits_5task_mine.yaml": "# @package _global_\noptimizer:\n  head_lr: 0.25\n",
        "scheduler/half.yaml": "_target_: inflora.schedule.step\n_partial_: true\nmilestones: [1]\ngamma: 0.5\n",
    }.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(text)
    others = [argument for argument in QUICK if not argument.startswith("method=")]
    said = cli("--config-dir", str(mine), "method=mine", *others, "scheduler=half", f"output_dir={tmp_path / 'run'}")
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert summary["applied_files"][0] == "recipe/digits_5task_mine" and config["optimizer"]["head_lr"] == 0.25
    assert config["scheduler"]["milestones"] == [1]


def test_what_is_typed_beside_a_recipe_and_may_change_what_comes_of_it():
    same = ["method=ease", "dataset=cifar100_20task", "seed=3", "trainer.device=cuda", "tracker=wandb", "+tracker.mode=offline"]
    other = ["backbone=vit_micro", "trainer.epochs=1", "dataset.class_order=natural", "~tuning", "method.rank=4", "debug=default"]
    assert changes([*same, *other, "dataset.root=there", "output_dir=here"]) == other


def test_a_terminal_of_few_characters_does_not_stop_a_finished_run(monkeypatch: pytest.MonkeyPatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    tolerate_any_encoding()
    print("\u22121.50", file=narrow, flush=True)
    assert narrow.buffer.getvalue().strip() == rb"\u22121.50"  # type: ignore[attr-defined]


def test_the_default_folder_names_the_run_and_the_time(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*QUICK, "seed=2").code == 0
    (folder,) = Path("outputs/digits_5task/linear_probe/seed=2").iterdir()
    time.strptime(folder.name, "%Y-%m-%d_%H-%M-%S-%f")
    assert num_rows(folder) == 2
    assert list(Path().iterdir()) == [Path("outputs")]


# ---- faults ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["hydra.run.dir=elsewhere"], "the folder of a run is output_dir; set output_dir=FOLDER instead of hydra.run.dir"),
        (["method=mos", "method.alignment.lr=0"], "method.alignment.lr=0 is too small; choose more than 0"),
        (["method=inflor"], f"method=inflor is not known; choose one of {', '.join(METHODS)}"),
        (["dataset=cifar10"], "dataset=cifar10 is not known; choose one of cifar100_10task, cifar100_20task,"),
        (["backbone=vit_b16"], "backbone=vit_b16 is not known; choose one of vit_b16_dino,"),
        (["method.rnk=4"], "method.rnk is not a key of this configuration; did you mean method.rank?"),
        (["trainer.epoch=4", "method=sequential"], "trainer.epoch is not a key of this configuration; did you mean trainer.epochs?"),
        (["+trainer.epoch=4"], "trainer.epoch is not a key of this configuration; `--cfg job` lists all keys"),
        (["dataset.options={a:1}"], "dataset.options takes its keys one by one; write +dataset.options.KEY=VALUE"),
        (["optimiser=adam"], "optimiser is not a key of this configuration; did you mean optimizer?"),
        (["zzz.qqq=1"], "zzz.qqq is not a key of this configuration; `--cfg job` lists all keys"),
        (["trainer.epochs=ten"], "trainer.epochs=ten does not fit: Value 'ten' of type 'str' could not be converted to Integer"),
        (["seed"], "seed"),
        (["dataset=imagefolder"], "dataset.root has no value; set dataset.root=..."),
        (["trainer.device=cpu", "trainer.precision=16"], "trainer.precision=16 needs a GPU; on a CPU choose bf16 or 32"),
        (["trainer.device=tpu"], "trainer.device=tpu is not known; choose one of auto, cpu, cuda, mps"),
        (
            ["dataset=cifar100_10task", "method=inflora_ca", "scheduler=constant"],
            "scheduler=constant does not change the schedule that the recipe of this pair brings (inflora.schedule.step); add '~recipe'",
        ),
        (
            ["+dataset.options.colour=1"],
            "dataset.options.colour is no setting of inflora.data.datasets.digits; remove it with '~dataset.opt",
        ),
        (
            ["-m", "dataset=imagefolder", "dataset.root=flowers,birds"],
            "a multirun cannot try several values of dataset.root, whose jobs would share a folder; run it once for each",
        ),
        (
            ["dataset=cifar100_10task", "recipe=cifar100_10task_inflra"],
            "recipe=cifar100_10task_inflra is not known; did you mean cifar100_10task_inflora, ",
        ),
        (["tuning=vit_micro_inflra"], "tuning=vit_micro_inflra is not known; did you mean vit_micro_inflora, "),
        (["-m", "hydra/sweeper=optima", "seed=0,1"], "hydra/sweeper=optima is not known; is its package installed?"),
        (["+dataset.options.split=coda"], "dataset.options.split is no option of its own; set dataset.split"),
        (["-m", "tracker=wandb", "tracker.project=a,b"], "a multirun cannot try several values of tracker.project"),
        (["-m", "seed=0,1", "output_dir=x"], "a multirun makes one folder for each job; set hydra.sweep.dir=FOLDER instead of output_dir"),
    ],
)
def test_a_wrong_command_line(cli: Cli, arguments, sentence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in fault(cli(*arguments))
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["dataset=imagefolder", "dataset.root=/nowhere"], "dataset.root=/nowhere does not exist; set it to a folder with train/<class>/*"),
        (["method=inflora", "method.rank=65"], "method.rank=65 exceeds the layer's 64 inputs; choose 1..64"),
        (["method=inflora", "method.rank=four"], "method.rank=four does not fit; it must be a whole number"),
        (
            ["method=inflora", "method.blocks=some"],
            "method.blocks=some does not fit; it must be a list, each item a whole number or a whole",
        ),
        (["method=inflora", "method.blocks=0"], "method.blocks=[] does not fit this backbone; choose distinct numbers from 0.."),
        (["method=inflora", "method.energy=grams"], "method.energy=grams is unknown; choose gram or input"),
        (["dataset.num_tasks=11"], "dataset.num_tasks=11 does not fit 10 classes; choose 1..10"),
        (["dataset.task_sizes=[5,4]"], "dataset.task_sizes=[5, 4] adds up to 9; give positive numbers that add up to the 10 classes"),
        (["dataset.class_order=[0,1]"], "dataset.class_order must list every class id 0..9 once; the list lacks 2, 3, 4, 5, 6 and 3 more"),
        (["dataset.class_order=random"], "dataset.class_order=random is unknown; choose natural, numpy:1993, python:1"),
        (["dataset.transform=blur"], "dataset.transform=blur is unknown; choose one of"),
        (["backbone.name=vit_base_patch16_224"], "backbone.name=vit_base_patch16_224 does not say which weights; choose one of"),
        (["backbone.name=vit_base_patch16_224.augreg_in22k"], "is not a known tag of vit_base_patch16_224; choose one of"),
        (["backbone.name=vti_base"], "backbone.name=vti_base is not a timm model; did you mean one of"),
        (["backbone.name=resnet18.a1_in1k"], "is not a vision transformer with a class token, which every method here needs"),
        (["backbone.checkpoint=/nowhere.pth"], "backbone.checkpoint=/nowhere.pth does not exist; give a .pth, .npz or .safetensors file"),
        (["optimizer=sgd", "optimizer.head_lr=1e38", "trainer.epochs=3"], "lower optimizer.lr and optimizer.head_lr"),
        (["scheduler=cosine", "+scheduler.lag=1"], "scheduler.lag is no setting of inflora.schedule.cosine; remove it with '~scheduler"),
        (["scheduler=step", "scheduler.milestones=[x]"], "scheduler.milestones=['x'] does not fit; it must be a list, each item a whole"),
        (["tracker=wandb", "tracker.mode=of"], "tracker.mode=of is not known; choose online, offline, disabled or null"),
    ],
)
def test_a_wrong_value(cli: Cli, arguments, sentence, tmp_path: Path):
    assert sentence in fault(cli(*QUICK, *arguments, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run" / "summary.json").exists()


def folders_of_images(root: Path, classes: int = 2, count: int = 3) -> Path:
    for part in ("train", "test"):
        for number in range(classes):
            folder = root / part / f"class_{number}"
            folder.mkdir(parents=True)
            for row in range(count):
                Image.new("RGB", (20, 20), (40 * number, 80 * row, 0)).save(folder / f"{row}.png")
    return root


@pytest.fixture
def own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INFLORA_CACHE", str(tmp_path / "cache"))
    yield folders_of_images(tmp_path / "images")


def test_a_truncated_image_is_named(cli: Cli, own_images: Path, tmp_path: Path):
    damaged = own_images / "train" / "class_1" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    arguments = [*QUICK, "dataset=imagefolder", f"dataset.root={own_images}", f"output_dir={tmp_path / 'run'}"]
    sentence = fault(cli(*arguments))
    assert f"image train/class_1/2.png in {own_images} cannot be decoded" in sentence
    assert sentence.endswith("replace or remove it, then run again")
    Image.new("RGB", (20, 20)).save(damaged)
    assert cli(*arguments).code == 0
    assert num_rows(tmp_path / "run") == 2


def test_a_checkpoint_of_another_model_names_its_keys(cli: Cli, tmp_path: Path):
    from safetensors.torch import save_file
    from torch import zeros

    file = tmp_path / "other.safetensors"
    save_file({"blocks.0.attn.query.weight": zeros(2, 2), "pos_embed": zeros(1, 5, 64)}, file)
    sentence = fault(cli(*QUICK, f"backbone.checkpoint={file}", f"output_dir={tmp_path / 'run'}"))
    assert f"backbone.checkpoint={file} does not fit the model; missing: blocks.0.attn.proj.bias, " in sentence
    assert "unexpected: blocks.0.attn.query.weight" in sentence


@pytest.mark.slow
def test_a_silent_network_is_told_within_half_a_minute(tmp_path: Path):
    """A proxy that takes every connection and never says a word, as a firewall may look."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        cut_off = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": "", "HF_HOME": str(tmp_path / "hub")}
        began = time.monotonic()
        done = train_py("dataset=cifar100_10task", "method=inflora", cwd=tmp_path, env=cut_off)
    assert time.monotonic() - began < 30
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) <= 3
    assert "cifar-100-python" in done.stderr


@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            OSError("the disk of the image cache is full: free some space there"),
            "the disk of the image cache is full: free some space there",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/run.log"),
            "the system refuses: [Errno 28] No space left on device: '/x/run.log'; put that right and run the same command again",
        ),
    ],
)
@pytest.mark.parametrize("cli", ["here"], indirect=True)
def test_what_the_system_refuses(cli: Cli, error, sentence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("inflora.data.datasets.digits", refused)
    assert fault(cli(*QUICK, f"output_dir={tmp_path}")) == sentence
    if sentence.endswith("run the same command again"):  # without it, the same command would start anew in a folder of another time
        monkeypatch.chdir(tmp_path)
        assert fault(cli(*QUICK)).startswith(f"{sentence} with output_dir=outputs/")


def test_a_folder_at_work_is_refused(cli: Cli, tmp_path: Path):
    with hold(tmp_path):
        sentence = fault(cli(*QUICK, f"output_dir={tmp_path}"))
    assert sentence == f"another process is at work in {tmp_path}; wait until it ends, or choose another output_dir"


def test_an_output_folder_that_cannot_be_made(cli: Cli, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "output_dir" in fault(cli(*QUICK, f"output_dir={tmp_path / 'file' / 'run'}"))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("arguments", [["method.rnk=1"], pytest.param(["dataset.num_tasks=11"], marks=pytest.mark.slow)])
def test_traceback_on_demand(arguments, tmp_path: Path):
    done = train_py(*QUICK, *arguments, "--traceback", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and arguments[0].split("=")[0] in done.stderr


def test_train_py_in_a_process_of_its_own():
    done = train_py("trainer.epochs=ten")
    sentence = fault(Said(done.returncode, done.stdout, done.stderr))
    assert sentence == "trainer.epochs=ten does not fit: Value 'ten' of type 'str' could not be converted to Integer"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("this container cannot mount a small disk")
    try:
        arguments = [*QUICK, "method=sequential_full", "dataset.num_tasks=5", f"output_dir={disk / 'run'}"]
        done = train_py(*arguments)
        sentence = fault(Said(done.returncode, done.stdout, done.stderr))
        assert "No space left on device" in sentence and "everything saved before is intact" in sentence
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        done = train_py(*arguments)
        assert done.returncode == 0, done.stderr
        assert num_rows(disk / "run") == 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- sweeps ------------------------------------------------------------------------------------------------------------------------


def test_a_sweep_and_its_rerun(cli: Cli, tmp_path: Path):
    sweep = tmp_path / "sweep"
    common = [text for text in QUICK if not text.startswith("method=")]
    arguments = ["-m", *common, "seed=0,1", "method=inflora,linear_probe", f"hydra.sweep.dir={sweep}"]
    first = cli(*arguments)
    assert first.code == 0, first.err
    folders = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert len(folders) == 4
    for method in ("inflora", "linear_probe"):
        for seed in (0, 1):
            (name,) = [name for name in folders if f"method={method}" in name and f"seed={seed}" in name]
            summary = json.loads((sweep / name / "summary.json").read_text())
            assert (summary["method"], summary["seed"]) == (method, seed)
            assert num_rows(sweep / name) == 2
    (folder,) = (sweep / name for name in folders if "method=linear_probe" in name and "seed=1" in name)
    assert cli(*common, "seed=1", "method=linear_probe", f"output_dir={tmp_path / 'single'}").code == 0
    for name in ("accuracy_matrix.csv", "task_aware_matrix.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "single" / name).read_bytes(), "a seed gives the same alone"

    before = {name: files_of(sweep / name) for name in folders}
    second = cli(*arguments)
    assert second.code == 0
    assert {name: files_of(sweep / name) for name in folders} == before
    assert second.out.count("This run is finished") == 4
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == folders


def test_a_failing_job_does_not_stop_the_others(cli: Cli, tmp_path: Path):
    arguments = [*QUICK, "dataset.num_tasks=11,2,99", "-m", f"hydra.sweep.dir={tmp_path}"]
    said = cli(*arguments)
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "error: dataset.num_tasks=11 does not fit 10 classes" in said.err
    assert "error: dataset.num_tasks=99 does not fit 10 classes" in said.err
    (finished,) = tmp_path.glob("*/summary.json")
    assert json.loads(finished.read_text())["num_tasks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cores", "submitit_local", "ray_cluster"])
def test_a_sweep_in_several_processes(launcher, tmp_path: Path):
    """`submitit_local` runs as Slurm would; `cores` is joblib. A failing job fails the sweep, and the others end as they do alone."""
    sweep, options = tmp_path / "sweep", []
    if launcher == "ray_cluster":
        # Not among the development requirements: the plugin wants an older cloudpickle than joblib does.
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed")
        options = ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]
    done = train_py(*QUICK, "dataset.num_tasks=2,11,5", f"hydra/launcher={launcher}", *options, f"hydra.sweep.dir={sweep}", "-m")
    assert done.returncode == 1, done
    said = done.stdout + done.stderr + "".join(path.read_text() for path in sweep.glob(".submitit/*/*.err"))
    assert "error: dataset.num_tasks=11 does not fit 10 classes" in said
    assert "Traceback" not in done.stderr
    assert sorted(json.loads(file.read_text())["num_tasks"] for file in sweep.glob("*/summary.json")) == [2, 5]
    assert train_py(*QUICK, "dataset.num_tasks=5", f"output_dir={tmp_path / 'alone'}").returncode == 0
    (folder,) = (file.parent for file in sweep.glob("*/summary.json") if num_rows(file.parent) == 5)
    assert (folder / "accuracy_matrix.csv").read_bytes() == (tmp_path / "alone" / "accuracy_matrix.csv").read_bytes()


def test_a_launcher_that_is_not_known(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sentence = fault(cli("-m", "hydra/launcher=cluster", "seed=0,1"))
    assert sentence == "hydra/launcher=cluster is not known; choose one of basic, cores, ray_cluster, slurm"


def test_a_launcher_that_is_not_installed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with contextlib.suppress(ImportError):
        import_module("hydra_plugins.hydra_ray_launcher")
        pytest.skip("hydra-ray-launcher is installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "missing.yaml").write_text("defaults:\n  - ray\n")
    arguments = ["hydra.searchpath=[file://" + str(tmp_path / "conf") + "]", "hydra/launcher=missing", "seed=0,1"]
    assert "this launcher needs a package that is not installed; run `pip install hydra-ray-launcher`" in fault(cli("-m", *arguments))


def test_a_job_that_cannot_be_composed_stops_a_sweep_before_it_begins(cli: Cli, tmp_path: Path):
    said = cli("-m", *QUICK, "method=linear_probe,inflor", f"hydra.sweep.dir={tmp_path}")
    assert "method=inflor is not known; choose one of" in fault(said)


# ---- stopping ----------------------------------------------------------------------------------------------------------------------


def activate(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` is the interpreter that runs the tests, as in an activated environment."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize("cli", ["here"], indirect=True)  # test_resume_slow.py stops processes
def test_a_stopped_run_says_how_to_continue(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from inflora.methods.linear_probe import LinearProbe

    activate(monkeypatch)
    original = LinearProbe.loss
    monkeypatch.setattr(LinearProbe, "loss", lambda *args: signal.raise_signal(signal.SIGTERM) or original(*args))
    folder = tmp_path / "run"
    said = cli(*QUICK, f"output_dir={folder}", "dataset.class_order=[1,0,2,3,4,5,6,7,8,9]", "resume=never")
    assert said.code == 130
    monkeypatch.setattr(LinearProbe, "loss", original)
    lines = said.err.splitlines()
    assert "Stopped; everything so far is saved. To continue:" in lines
    command = shlex.split(lines[-1])
    assert command[:3] == ["python", "train.py", f"output_dir={folder}"]
    assert cli(*command[2:]).code == 0
    assert num_rows(folder) == 2


@pytest.mark.parametrize("cli", ["here"], indirect=True)
def test_the_command_that_is_said_goes_on_in_the_default_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from inflora.methods.linear_probe import LinearProbe

    monkeypatch.chdir(tmp_path)
    original = LinearProbe.loss
    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "loss", lambda *args: signal.raise_signal(signal.SIGINT) or original(*args))
        said = cli(*QUICK)
    (folder,) = Path("outputs/digits_5task/linear_probe/seed=0").iterdir()  # Hydra's grammar has no such value without quotes
    command = shlex.split(said.err.splitlines()[-1])
    assert command[2] == f"output_dir={folder}"
    assert cli(*command[2:]).code == 0
    assert num_rows(folder) == 2


def test_the_command_names_the_interpreter_that_has_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other, own = tmp_path / "other" / "python", tmp_path / "clone" / ".venv" / "bin" / "python"
    for program in (other, own):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.chdir(tmp_path / "clone")
    assert _program() == [".venv/bin/python", "train.py"]
    monkeypatch.chdir(tmp_path / "other")
    assert _program() == [str(own), "train.py"]
    monkeypatch.setenv("PATH", f"{own.parent}:{other.parent}")  # as `source .venv/bin/activate` sets it
    assert _program() == ["python", "train.py"]
    newer = own.with_name("python3.99")
    newer.write_text("#!/bin/sh\n")
    monkeypatch.setattr(sys, "executable", str(newer))
    assert _program() == [str(newer), "train.py"], "another one in the same folder"
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/inflora-train"])
    assert _program() == ["inflora-train"]
    assert _continuing("a b", ["resume=never", "seed=1"], is_launched=False) == "inflora-train 'output_dir=a b' seed=1"
    monkeypatch.setattr(sys, "argv", ["inflora-train", "--config-dir", "mine", "hydra.searchpath=[file://more]", "seed=1"])
    command = "inflora-train --config-dir mine 'hydra.searchpath=[file://more]' output_dir=x seed=1"
    assert _continuing("x", ["seed=1"], is_launched=False) == command
    assert _continuing("a b", ["resume=never", "seed=1"], is_launched=True) == "the same command, with 'output_dir=a b' resume=auto"


@pytest.mark.parametrize("name", ["seed=0", "it's (1)", "a=b,c=d", "a,b", "~x", "a\\b=1", "ä b"])
def test_a_path_may_have_any_characters(cli: Cli, name: str, tmp_path: Path):
    folder = tmp_path / name
    assert cli(*QUICK, f"output_dir={folder}").code == 0
    assert num_rows(folder) == 2


@pytest.mark.parametrize("cli", ["here"], indirect=True)  # test_resume_slow.py stops processes
def test_an_impatient_interrupt_leaves_without_a_traceback(cli: Cli, tmp_path: Path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    activate(monkeypatch)
    monkeypatch.setattr("inflora.run.build_backbone", interrupted)
    said = cli(*QUICK, f"output_dir={tmp_path}")
    assert said.code == 130
    assert "Traceback" not in said.err
    assert "Stopped; what the last checkpoint holds is saved. To continue:\n  python train.py output_dir=" in said.err


@pytest.mark.parametrize("is_multirun", [False, True])
@pytest.mark.parametrize(
    ("given", "read"), [("1_000", "1_000"), ("12e400", "12e400"), ("007", "007"), ("true", "true"), ("null", None), ("a", "a")]
)
def test_a_path_that_reads_as_a_number_stays_a_path(given: str, read: str | None, is_multirun: bool):
    override = OverridesParser.create().parse_override(quoted(f"dataset.root={given}", is_multirun))
    value: Any = override.value()
    assert getattr(value, "text", value) == read
