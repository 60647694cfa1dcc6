"""Types of what the core reads from the configuration, as Hydra schemas; defaults live in conf/."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


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
    eval_batch_size: int = MISSING
    grad_clip: float | None = None
    device: str = MISSING
    num_devices: int = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    num_workers: int = MISSING
    progress: bool = MISSING


@dataclass
class RunConfig:
    """One run. The groups typed `Any` are plug-ins: their keys are the arguments of the class or function they name."""

    seed: int = MISSING
    resume: str = MISSING
    output_dir: str = MISSING
    dataset: DatasetConfig = MISSING
    backbone: BackboneConfig = MISSING
    method: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: TrainerConfig = MISSING
    tracker: Any = MISSING


CHOICES = {
    "resume": ("auto", "never"),
    "dataset.normalize": ("none", "timm"),
    "trainer.device": ("auto", "cpu", "cuda", "mps"),
    "trainer.precision": ("32", "bf16", "16"),
}

AT_LEAST = {
    "trainer.epochs": 1,
    "trainer.batch_size": 1,
    "trainer.eval_batch_size": 1,
    "trainer.num_devices": 1,
    "trainer.num_workers": 0,
    "seed": 0,
}


class ConfigurationError(ValueError):
    """A value in the configuration cannot be used; the message says which, what is allowed, and what to do."""


def register() -> None:
    """Make the schema known to Hydra under the name `schema`."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def check(cfg: DictConfig) -> None:
    """Check what types alone cannot, all at once.

    Raises:
        ConfigurationError: one sentence for each fault.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    faults = [f"{key} has no value; set {key}=..." for key in missing]
    if not faults:
        for key, allowed in CHOICES.items():
            value = str(OmegaConf.select(cfg, key))
            if value not in allowed:
                faults.append(f"{key}={value} is not known; choose one of {', '.join(allowed)}")
        for key, least in AT_LEAST.items():
            value = OmegaConf.select(cfg, key)
            if value < least:
                faults.append(f"{key}={value} is too small; choose {least} or more")
    if faults:
        raise ConfigurationError("\n".join(faults))
