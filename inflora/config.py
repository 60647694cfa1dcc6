"""Types of what the core reads from the configuration, as Hydra schemas; defaults live in conf/."""

import hashlib
import inspect
import os
import re
from collections.abc import Collection, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf

RESULT_FREE = {
    "output_dir",
    "published",
    "resume",
    "tracker",
    "dataset.root",
    "trainer.device",
    "trainer.num_devices",
    "trainer.num_workers",
    "trainer.eval_batch_size",
    "trainer.grad_accumulation",
    "trainer.grad_checkpointing",
    "trainer.progress",
}
"""Keys that say where and how a run is done: it may continue with other values, and runs that differ in them alone are one experiment.

They change no result beyond rounding, but for what compares the images of a batch with each other, which sees those of a process or of a
part of the batch (`lora_drs`, `hide_prompt` and `mos` say so). The tasks themselves check what `dataset.root` holds.
"""


@dataclass
class DatasetConfig:
    """Which images, in which tasks."""

    _target_: str = MISSING
    root: str = MISSING
    num_tasks: int = MISSING
    task_sizes: list[int] | None = None
    class_order: Any = MISSING
    split: str | None = None
    transform: str = MISSING
    normalize: str = MISSING
    validation_fraction: float = MISSING
    max_train_per_class: int | None = None
    max_test_per_class: int | None = None
    image_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class BackboneConfig:
    """Which pretrained transformer."""

    name: str = MISSING
    pretrained: bool = MISSING
    checkpoint: str | None = MISSING  # a default here would stand in for a yaml's `???`


@dataclass
class TrainerConfig:
    """How long, on what."""

    epochs: int = MISSING
    batch_size: int = MISSING
    eval_batch_size: int | None = None
    grad_clip: float | None = None
    grad_accumulation: int = MISSING
    grad_checkpointing: bool = MISSING
    device: str = MISSING
    num_devices: int = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    num_workers: int = MISSING
    progress: bool = MISSING


@dataclass
class PublishedConfig:
    """What the recipe of a pair says of itself.

    Attributes:
        source: where its values come from; "ours, not published ..." where nobody has published any.
        figures: where the accuracies come from; None: the source.
        last_accuracy: percent, over all classes after the last task.
        average_accuracy: percent, the mean over the tasks.
        differs: what was otherwise there.
    """

    source: str | None = None
    figures: str | None = None
    last_accuracy: float | None = None
    average_accuracy: float | None = None
    differs: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One run. The groups typed `Any` are plug-ins: their keys are the arguments of the class or function they name."""

    seed: int = MISSING
    resume: str = MISSING
    output_dir: str = MISSING
    dataset: DatasetConfig = MISSING
    backbone: BackboneConfig = MISSING
    method: Any = MISSING
    alignment: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: TrainerConfig = MISSING
    tracker: Any = MISSING
    published: PublishedConfig = field(default_factory=PublishedConfig)


CHOICES = {
    "resume": ("auto", "never"),
    "dataset.normalize": ("none", "timm"),
    "trainer.device": ("auto", "cpu", "cuda", "mps"),
    "trainer.precision": ("32", "bf16", "16"),
}

AT_LEAST = {
    "trainer.epochs": 1,
    "trainer.batch_size": 1,
    "trainer.grad_accumulation": 1,
    "trainer.num_devices": 1,
    "trainer.num_workers": 0,
    "seed": 0,
    "optimizer.lr": 0,
    "optimizer.head_lr": 0,
}


ALL_KEYS = "`--cfg job` lists all keys"


class ConfigurationError(ValueError):
    """A value in the configuration cannot be used; the message says which, what is allowed, and what to do."""


def register() -> None:
    """Make the schema known to Hydra under the name `schema`, and `${folder_name:...}` to OmegaConf."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def folder_name(overrides: str) -> str:
    """A job's overrides as the name of one folder: no tracker settings, no slashes, at most 200 bytes (the last are then a hash).

    "default" where nothing is left: the folder above is not one of a run.
    """
    name = re.sub(r"(^|,)\+{0,2}tracker\.[^,=]+=(\[[^\]]*\]|[^,]*)", "", overrides).lstrip(",").replace("/", "_")
    if os.name == "nt":
        name = re.sub(r'[\\:*?"<>|]', "_", name)
    if len(name.encode()) <= 200:
        return name or "default"
    return f"{name.encode()[:190].decode(errors='ignore')}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read(folder: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run in a folder; None where there is none.

    Raises:
        ValueError: if its file is damaged.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return None
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} cannot be read as the configuration of a run; restore it from a copy, or use another folder")
    return found


def leaves(config: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Dotted key -> value, for every value of a nested configuration that is not itself a group; an empty group is a value.

    Args:
        config: the configuration.
        without: dotted keys to leave out; a key stands for everything below it too.
    """
    found = {}
    for name, value in config.items():
        if name in without:
            continue
        if isinstance(value, Mapping) and value:
            below = [key.removeprefix(f"{name}.") for key in without if key.startswith(f"{name}.")]
            found |= {f"{name}.{key}": inner for key, inner in leaves(value, below).items()}
        else:
            found[name] = value
    return found


def check(cfg: DictConfig) -> None:
    """Check what types alone cannot, all at once.

    Raises:
        ConfigurationError: one sentence for each fault.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    faults = [f"{key} has no value; set {key}=..." for key in missing]
    if not faults:
        # `+key=value` adds to what the schema names, and nobody would read it.
        groups = {"dataset.": DatasetConfig, "backbone.": BackboneConfig, "trainer.": TrainerConfig, "published.": PublishedConfig}
        for prefix, schema in {"": RunConfig, **groups}.items():
            found = OmegaConf.select(cfg, prefix[:-1]) or {} if prefix else cfg  # runs of earlier versions have no `published`
            added = sorted(set(found) - {each.name for each in fields(schema)} - {"hydra"})
            faults += [f"{prefix}{key} is not a key of this configuration; {ALL_KEYS}" for key in added]
        for key, allowed in CHOICES.items():
            value = str(OmegaConf.select(cfg, key))
            if value not in allowed:
                faults.append(f"{key}={value} is not known; choose one of {', '.join(allowed)}")
        for key, least in AT_LEAST.items():
            value = OmegaConf.select(cfg, key)
            if not _fits(value, float):
                faults.append(f"{key}={value} does not fit; it must be {_in_words(float)}")
            elif value < least:
                faults.append(f"{key}={value} is too small; choose {least} or more")
        size, clip = cfg.trainer.eval_batch_size, cfg.trainer.grad_clip
        if size is not None and size < 1:
            faults.append(f"trainer.eval_batch_size={size} is too small; choose 1 or more, or null for what suits the device")
        if clip is not None and clip <= 0:
            faults.append(f"trainer.grad_clip={clip} is too small; choose more than 0, or null for no clipping")
    if faults:
        raise ConfigurationError("\n".join(faults))


def check_arguments(group: str, settings: Mapping[str, Any]) -> None:
    """Compare a plug-in's settings with the types its class or function declares; what cannot be understood is let through.

    Args:
        group: the config group, for the message.
        settings: its keys, with `_target_`.

    Raises:
        ConfigurationError: one sentence for each setting that is not known, and for each value that does not fit.
    """
    try:
        target = get_object(settings["_target_"])
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{group}._target_={settings['_target_']} cannot be imported: {error}") from error
    try:
        hints = get_type_hints(target.__init__ if isinstance(target, type) else target)
    except (NameError, TypeError):  # names that exist for type checkers only; an object that is called
        return
    unknown = _unknown_arguments(target, settings)
    wrong = [key for key, value in settings.items() if key in hints and not _fits(value, hints[key])]
    faults = [f"{group}.{key} is no setting of {settings['_target_']}; remove it with '~{group}.{key}'" for key in unknown]
    faults += [f"{group}.{key}={settings[key]} does not fit; it must be {_in_words(hints[key])}" for key in wrong]
    if faults:
        raise ConfigurationError("\n".join(faults))


def check_data_options(target: str, options: Mapping[str, Any]) -> None:
    """Check `dataset.options` against what the data set's function takes beside `root` and `split`.

    Raises:
        ConfigurationError: one sentence for each option that is not known, does not fit, or is missing.
    """
    check_arguments("dataset.options", {"_target_": target, **options})
    if twice := sorted({"root", "split"} & set(options)):
        raise ConfigurationError(f"dataset.options.{twice[0]} is no option of its own; set dataset.{twice[0]}")
    try:
        inspect.signature(get_object(target)).bind("", split=None, **options)
    except TypeError as error:
        raise ConfigurationError(f"dataset.options do not suit {target} ({error}); set +dataset.options.KEY=VALUE") from error


def _unknown_arguments(target: Any, settings: Mapping[str, Any]) -> list[str]:
    """Keys that the class or function does not take: those of another choice of the group, which a recipe was written for."""
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [key for key in settings if key not in parameters and not key.startswith("_")]


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) in (list, AbstractSequence):
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) in (list, AbstractSequence):
        return f"a list, each item {_in_words(get_args(hint)[0])}"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return _WORDS.get(hint, str(hint))
