"""The command line around `run`: Hydra composes the configuration, faults become one sentence, help is written in words."""

import contextlib
import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from inflora import config, plugins
from inflora.terminal import tolerate_any_encoding

EXIT_FAULT, EXIT_STOPPED = 1, 130

FOUND_BY_NAME = ("recipe", "inputs", "tuning")

PATH_KEYS = ("output_dir", "dataset.root", "backbone.checkpoint", "hydra.sweep.dir")

GROUPS = {
    "dataset": "what to learn",
    "method": "how to learn it",
    "backbone": "the pretrained transformer",
    "optimizer": "steps",
    "scheduler": "learning rate over the epochs of a task",
    "alignment": "what is done to the heads of a method after each task but the first",
    "trainer": "epochs, batch size, device, precision",
    "tracker": "where numbers go, besides the run folder",
    "experiment": "prepared studies",
    "debug": "quick modes",
    "hydra/launcher": "who runs the jobs of a multirun; without it, one after the other",
}

HELP = """\
usage: python train.py [--multirun] [group=choice ...] [key=value ...]

Trains one method on one task sequence. Without arguments: InfLoRA on the embedded digits, about a minute, no network.

  python train.py dataset=cifar100_10task method=inflora       the published experiment
  python train.py -m seed=0,1,2 method=inflora,sequential      six runs; the same command again finishes what is missing
  python train.py output_dir=FOLDER ...                        continues the run in FOLDER, or prints its table if it is finished

Installed as a package, `inflora-train` takes the place of `python train.py`.
"""

FOOT = """\
found by name, where there is one (a run prints which; '~recipe', '~inputs' or '~tuning' leaves it out)
  recipe   conf/recipe/<dataset>_<method>.yaml     the hyper-parameters of the pair, published ones where there are any
  inputs   conf/inputs/<backbone>_<dataset>.yaml   how the images reach another backbone than the published one
  tuning   conf/tuning/<backbone>_<method>.yaml    the method's rates on another backbone

options
  --cfg job       print the composed configuration, with every key, and exit
  --traceback     show the whole traceback of an error
  -m, --multirun  run every combination of comma-separated values

afterwards
  python -m inflora.report RUN_OR_MULTIRUN_DIR... --out DIR    tables and figures over seeds
  python -m inflora.evaluate RUN_DIR                           test a finished run again
  python -m inflora.export RUN_DIR --out DIR                   its model as a plain timm model, ONNX or PEFT adapter
  python -m inflora.predict DIR image...                       classify files with an exported model
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves through `SystemExit` with 0, 1 (a fault, said in one sentence) or 130 (stopped, can be continued)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        with contextlib.suppress(BrokenPipeError):  # `--help | head` closes the pipe
            print_help()
            sys.stdout.flush()
        sys.exit(0)
    show_traceback = "--traceback" in arguments
    is_multirun = "-m" in arguments or "--multirun" in arguments
    options = [argument for argument in arguments if not _is_override(argument) and argument != "--traceback"]
    others = [quoted(argument, is_multirun) for argument in arguments if _is_override(argument)]
    sys.argv[1:] = options + others  # in this order, because argparse takes no values on both sides of an option
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to us, instead of Hydra's own printing
    config.register()
    plugins.register()
    job = Job(show_traceback)
    app = hydra.main(version_base="1.3", config_path=str(plugins.own_conf()), config_name="config")(job)
    try:
        if is_multirun:
            _check_sweep(others)
        elif any(argument.startswith("hydra.run.dir=") for argument in others):
            raise ValueError("the folder of a run is output_dir; set output_dir=FOLDER instead of hydra.run.dir")
        app()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: options that exclude each other
        if show_traceback:
            raise
        _say_fault(_composition_fault(error, sys.argv[1:]))
        sys.exit(EXIT_FAULT)
    except JobFailed:  # which has been said
        sys.exit(EXIT_FAULT)
    except OSError as error:  # the output folder cannot be made
        if show_traceback:
            raise
        _say_fault(f"output_dir cannot be written: {error}")
        sys.exit(EXIT_FAULT)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    sys.exit(0)


def _is_override(argument: str) -> bool:
    """Whether an argument is a key with a value, or one that is taken away; else it is an option of Hydra's, or the value of one."""
    return ("=" in argument and not argument.startswith("-")) or argument.startswith(("~", "+"))


def quoted(argument: str, is_multirun: bool) -> str:
    """A path as Hydra reads it: in quotes where its grammar has another use for a character, such as the `=` in a run's default folder.

    Args:
        argument: one of the command line's.
        is_multirun: whether a comma parts several values.
    """
    key, equals, value = argument.partition("=")
    if not equals or key not in PATH_KEYS or not value:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        is_sweep = override.is_sweep_override()
        reads_as_number = not is_sweep and isinstance(override.value(), (int, float))
        if not reads_as_number and (is_multirun or not is_sweep):
            return argument
    except HydraException:
        pass
    return f"{key}={QuotedString(os.path.expanduser(value), Quote.single).with_quotes()}"


def _check_sweep(arguments: Sequence[str]) -> None:
    """What changes no result is not part of a job's folder: jobs that differ in nothing else would be taken for one.

    Raises:
        ValueError: if such a key has several values.
    """
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:  # an option of Hydra's, or a mistake, which Hydra will name
            continue
        key = override.key_or_group
        if override.is_sweep_override() and (key in config.RESULT_FREE or key.startswith("tracker.")):
            raise ValueError(
                f"a multirun cannot try several values of {key}, whose jobs would share a folder; run it once for each, "
                "with a hydra.sweep.dir=FOLDER of its own"
            )


class JobFailed(Exception):
    """A job could not do its work and has said why. Hydra hands it on when all jobs of a multirun have had their turn."""


class Job:
    """One Hydra job, in this process or in one that a launcher starts. One that fails says why, and does not keep others from starting."""

    def __init__(self, show_traceback: bool) -> None:
        self.show_traceback = show_traceback

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        config.register()  # a launcher has brought the job to a process that does not know the configuration yet

    def __call__(self, cfg: DictConfig) -> None:
        from inflora.checkpoint import WriteError
        from inflora.run import (  # torch takes seconds to import: a misspelt key should not wait for it
            USER_ERRORS,
            Origin,
            run,
            started_by_launcher,
        )
        from inflora.trainer import Interrupted

        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:
            if any(override.startswith("output_dir=") for override in hydra_config.overrides.task):
                _say_fault("a multirun makes one folder for each job; set hydra.sweep.dir=FOLDER instead of output_dir")
                sys.exit(EXIT_FAULT)  # unlike a failed job, this stops the sweep
            cfg.output_dir = hydra_config.runtime.output_dir
        started = None
        tolerate_any_encoding()
        try:
            started = started_by_launcher(cfg.trainer.num_devices)
            _check_found_by_name(hydra_config)
            _check_scheduler(cfg, hydra_config)
            names = {group: hydra_config.runtime.choices[group] for group in ("method", "dataset", "backbone")}
            typed = changes(hydra_config.overrides.task)
            run(cfg, Origin(names, list(applied_files(hydra_config)), hydra_files(cfg, hydra_config), typed))
        except (Interrupted, KeyboardInterrupt) as stop:
            saved = "everything so far is saved" if isinstance(stop, Interrupted) else "what the last checkpoint holds is saved"
            command = "the same command"
            if hydra_config.mode == RunMode.RUN:
                command = _continuing(cfg.output_dir, hydra_config.overrides.task, is_launched=started is not None)
            if started is None or started.rank == 0:
                Console(stderr=True).print(f"Stopped; {saved}. To continue:\n  {_escape(command)}", highlight=False, soft_wrap=True)
            sys.exit(EXIT_STOPPED)
        except USER_ERRORS as error:
            if self.show_traceback:
                raise
            is_systems = isinstance(error, OSError) and error.errno is not None  # a few words and a file, without what to do
            text = f"the system refuses: {error}" if is_systems else str(error)
            if is_systems or isinstance(error, WriteError):
                text += "; put that right and run the same command again"
                if hydra_config.mode == RunMode.RUN and not any(each.startswith("output_dir=") for each in hydra_config.overrides.task):
                    text += f" with output_dir={cfg.output_dir}"
            if started is None or started.rank == 0:  # the others end for the same reason
                _say_fault(text)
        else:
            return
        # Out of the handler, so that the error and what its frames hold, locks among it, do not live on as the context of another.
        if hydra_config.mode == RunMode.MULTIRUN:
            raise JobFailed  # the other jobs still have their turn
        sys.exit(EXIT_FAULT)


def _continuing(folder: str, overrides: Sequence[str], *, is_launched: bool) -> str:
    """The command that goes on in a run's folder; torchrun's or srun's own part of it cannot be known."""
    others = [override for override in overrides if not override.startswith(("output_dir=", "resume="))]
    if not is_launched:
        # Where Hydra looks for further configuration is no override of the task.
        where = [each for each in sys.argv[1:] if each.startswith("hydra.searchpath=") or not _is_override(each)]
        return shlex.join([*_program(), *where, f"output_dir={folder}", *others])
    changes = [f"output_dir={folder}", *(["resume=auto"] if any(override.startswith("resume=") for override in overrides) else [])]
    return f"the same command, with {shlex.join(changes)}"


def _program() -> list[str]:
    """How this program was called: by a script and the interpreter it needs, or by the command that comes with the package."""
    script = sys.argv[0]
    if not script.endswith(".py"):
        return [os.path.basename(script)]
    found, own = shutil.which("python"), Path(sys.executable)
    # The folder too: an environment's interpreter is a link to another one's.
    if found is not None and Path(found).parent == own.parent and os.path.samefile(found, own):
        return ["python", script]
    return [str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own), script]


def _check_found_by_name(hydra_config: Any) -> None:
    """Hydra leaves out what is optional and not there, also where it was typed.

    Raises:
        ValueError: if a recipe, inputs or tuning file is named that does not exist.
    """
    for group in FOUND_BY_NAME:
        choice = hydra_config.runtime.choices.get(group)
        if _is_typed(hydra_config, group) and choice is not None and _file_of(hydra_config, group, choice) is None:
            known = list(plugins.choices(group))
            near = difflib.get_close_matches(choice, known, n=3, cutoff=0.6) or known[:3]
            raise ValueError(f"{group}={choice} is not known; did you mean {', '.join(near)}? ('~{group}' leaves it out)")


def _is_typed(hydra_config: Any, group: str) -> bool:
    """Whether the command line chooses from the group."""
    return any(override.startswith(f"{group}=") for override in hydra_config.overrides.task)


def _check_scheduler(cfg: DictConfig, hydra_config: Any) -> None:
    """A recipe may bring the schedule of its pair; one that is typed is to win, and cannot.

    The recipe sets the schedule's own `_target_`: Hydra lets no file that is found by name choose from a group.

    Raises:
        ValueError: if both are there.
    """
    choice, found = hydra_config.runtime.choices.scheduler, cfg.scheduler._target_
    file = _file_of(hydra_config, "scheduler", choice) if _is_typed(hydra_config, "scheduler") else None
    chosen = yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_") if file is not None else None
    if chosen is not None and chosen != found:
        raise ValueError(f"scheduler={choice} does not change the schedule that the recipe of this pair brings ({found}); add '~recipe'")


def applied_files(hydra_config: Any) -> Iterator[str]:
    """The recipe, inputs and tuning files that the choices brought in, as `recipe/cifar100_10task_inflora`."""
    for group in FOUND_BY_NAME:
        choice = hydra_config.runtime.choices.get(group)
        if choice is not None and _file_of(hydra_config, group, choice) is not None:
            yield f"{group}/{choice}"


def changes(overrides: Sequence[str]) -> list[str]:
    """Those of a run's overrides that may set it apart from what the recipe of its pair was published with."""

    def is_free(key: str) -> bool:
        return key in ("dataset", "method", "seed") or any(key == free or key.startswith(f"{free}.") for free in config.RESULT_FREE)

    return [override for override in overrides if not is_free(override.partition("=")[0].lstrip("+~"))]


def _file_of(hydra_config: Any, group: str, choice: str) -> Traversable | None:
    """The file that Hydra takes for a choice, in whatever folder or package it looks; None where there is none."""
    for source in hydra_config.runtime.config_sources:
        if source.schema in ("file", "pkg"):
            root = Path(source.path) if source.schema == "file" else files(source.path)
            file = root / group / f"{choice}.yaml"
            if file.is_file():
                return file
    return None


def hydra_files(cfg: DictConfig, hydra_config: Any) -> dict[str, str]:
    """What Hydra would write in `.hydra/`: the project writes it, so that a finished run can be looked at without being touched."""
    return {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": OmegaConf.to_container(hydra_config)})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_config.overrides.task),
    }


def print_help() -> None:
    """Every group with its choices and their descriptions, in words."""
    print(HELP)
    for group, meaning in GROUPS.items():
        print(f"{group}: {meaning}")
        found = plugins.choices(group)
        width = max((len(name) for name in found), default=0)
        for name, description in found.items():
            print(f"  {group}={name:<{width}}  {description}")
        print()
    print(FOOT, end="")


def _say_fault(text: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(text)}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _composition_fault(error: Exception, arguments: Sequence[str]) -> str:
    """One sentence for what Hydra or OmegaConf could not do with the command line."""
    text = str(error)
    if match := re.search(r"Could not (?:find|load) 'hydra/launcher/([^']+)'", text):
        return _launcher_fault(match[1])
    if match := re.search(r"Could not find '(.+)/([^'/]+)'", text):
        group, choice = match.groups()
        known = ", ".join(plugins.choices(group))
        return f"{group}={choice} is not known; " + (f"choose one of {known}" if known else "is its package installed?")
    if match := re.search(r"Could not override '([\w.]+)'", text):
        key = match[1]
        if key == "dataset.options":  # the only key that is free inside
            return "dataset.options takes its keys one by one; write +dataset.options.KEY=VALUE"
        near = difflib.get_close_matches(key, _known_keys(arguments, key), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else config.ALL_KEYS
        return f"{key} is not a key of this configuration; {hint}"
    if match := re.search(r"Error merging override (\S+)", text):
        reason = str(error.__cause__ or "").splitlines()
        return f"{match[1]} does not fit: {reason[0] if reason else 'the value has the wrong type'}"
    return " ".join(text.split("See https://hydra.cc")[0].split())


def _launcher_fault(choice: str) -> str:
    packages = {"joblib": "hydra-joblib-launcher", "submitit_slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}
    if choice in packages:
        return f"this launcher needs a package that is not installed; run `pip install {packages[choice]}`"
    return f"hydra/launcher={choice} is not known; choose one of basic, {', '.join(plugins.choices('hydra/launcher'))}"


def _known_keys(arguments: Sequence[str], wrong: str) -> list[str]:
    """All keys of the configuration that these arguments, without the wrong one, compose to."""
    from hydra import compose, initialize_config_dir

    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith(("-", wrong, f"+{wrong}"))]
    try:
        with initialize_config_dir(str(plugins.own_conf()), version_base="1.3"):
            cfg = compose("config", overrides=[override for override in overrides if "," not in override])
    except (HydraException, OmegaConfBaseException):
        return list(GROUPS)
    return [*config.leaves(OmegaConf.to_container(cfg)), *GROUPS]  # type: ignore[arg-type]
