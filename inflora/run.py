"""`run(cfg)`: everything one run does, from a composed configuration to a finished run folder."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from torch.multiprocessing import ProcessExitedException

from inflora import config as configuration
from inflora import report, run_folder
from inflora.backbone import Backbone, batch_without_training, build_backbone, write_out_attention
from inflora.checkpoint import CheckpointError, write_atomically
from inflora.data.datasets import Splits
from inflora.data.tasks import Loading, TaskSequence, parse_class_order, split_task_sizes
from inflora.data.transforms import build_transforms
from inflora.device import has_device, is_cpu
from inflora.method import Method
from inflora.parts.collective import failing_together, gather_objects
from inflora.progress import ConsoleHandler
from inflora.results import Records, read_summary, reset_peak_memory, summary
from inflora.seeding import seed_everything
from inflora.terminal import tolerate_any_encoding
from inflora.trackers import JsonlTracker, Trackers
from inflora.trainer import Interrupted, Trainer, TrainingError, stop_signals_to

log = logging.getLogger("inflora")

USER_ERRORS = (ValueError, OSError, CheckpointError, TrainingError)

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass
class Parts:
    """What a run is made of."""

    fabric: Fabric
    sequence: TaskSequence
    backbone: Backbone
    method: Method


@dataclass  # not frozen: launching several processes copies it field by field
class Origin:
    """Where a configuration came from, for the records.

    Attributes:
        names: the choices made: `dataset`, `method`, `backbone`.
        applied_files: the recipe, inputs and tuning files that went into it, as `recipe/cifar100_10task_inflora`.
        hydra_files: file name -> content for `.hydra/`.
        changes: what was typed, such as `trainer.epochs=1`, that may change what comes of the recipe; None: not known.
    """

    names: dict[str, str]
    applied_files: list[str] = field(default_factory=list)
    hydra_files: dict[str, str] = field(default_factory=dict)
    changes: list[str] | None = None

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Origin":
        """For a configuration composed elsewhere: names from what it points at."""
        targets = {key: plain[key]["_target_"] for key in ("dataset", "method")}
        return cls(
            {
                "dataset": targets["dataset"].rpartition(".")[2],
                "method": targets["method"].split(".")[-2],
                "backbone": plain["backbone"]["name"],
            }
        )


def run(cfg: DictConfig, origin: Origin | None = None) -> dict[str, Any]:
    """Do, continue, or just look up one run.

    Args:
        cfg: the composed configuration; see conf/config.yaml.
        origin: where it came from; None if it was composed outside the command line.

    Returns:
        The run's summary, as written to `summary.json`.

    Raises:
        One of `USER_ERRORS`: with one sentence for the user.
        Interrupted: after SIGINT or SIGTERM; everything needed to continue is saved.
    """
    configuration.check(cfg)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    origin = origin or Origin.of(plain)
    folder = Path(plain["output_dir"])
    # Where a launcher has started several processes, they look together, once they have met: not all machines may see the folder.
    if started_by_launcher(plain["trainer"]["num_devices"]) is None and (finished := _finished(folder, plain)) is not None:
        _show_finished(folder, finished)
        return finished
    with sound_kernels():
        return _launch(make_fabric(plain["trainer"]), plain, origin)


def _finished(folder: Path, plain: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the run asked for, if the folder holds it and it is finished. Touches nothing.

    Raises:
        ValueError: if the folder holds another run, or one on other images.
    """
    found = run_folder.look_up(folder, plain)
    if found is None:
        return None
    finished, known = found
    if known["dataset"]["root"] != plain["dataset"]["root"]:
        _check_images_of_finished(folder, plain)
    return finished


def _show_finished(folder: Path, finished: dict[str, Any]) -> None:
    print(f"This run is finished: {folder}")
    report.print_table(finished)
    if not (folder / "report" / "report.html").exists():  # it was killed in between
        print(f"It has no report yet; python -m inflora.report {folder} --out {folder / 'report'} writes it")


@contextmanager
def sound_kernels() -> Iterator[None]:
    """Inside, cuDNN spoils no numbers. By itself it computes the patch embedding with ten bits where precision is 32, and in half precision
    the gradients of its attention may be NaN (pytorch/pytorch#196678, NVIDIA/cudnn-frontend#1072); torch has other fused kernels for that.

    Fabric recommends at every start to have no more bits in any product, which is not printed.
    """
    fabric_log = logging.getLogger("lightning_fabric")
    level, allowed, is_enabled = fabric_log.level, torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    fabric_log.setLevel(logging.WARNING)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        fabric_log.setLevel(level)
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)


def make_fabric(trainer: dict[str, Any]) -> Fabric:
    """Devices, processes and precision of the run."""
    processes, device = trainer["num_devices"], trainer["device"]
    if not has_device(device):
        raise ValueError(f"trainer.device={device}, but torch finds no such device on this machine; choose auto or cpu")
    started = started_by_launcher(processes)
    if started is not None and processes != started.total:
        raise ValueError(
            f"trainer.num_devices={processes}, but {started.by} started {started.total} processes; set trainer.num_devices={started.total}"
        )
    here = processes if started is None else started.here
    if here > 1 and not torch.cuda.is_available() and torch.backends.mps.is_available() and device in ("auto", "mps"):
        raise ValueError(f"trainer.num_devices={processes}, but mps is one device; set trainer.num_devices=1, or trainer.device=cpu")
    if torch.cuda.is_available() and device in ("auto", "cuda") and here > torch.cuda.device_count():
        see_all = ", or let every task see all (srun --gpus-per-node, not --gpus-per-task)" if started and started.by == "srun" else ""
        raise ValueError(
            f"{here} processes on this machine exceed the {torch.cuda.device_count()} CUDA devices that each sees; "
            f"lower trainer.num_devices{see_all}"
        )
    if trainer["precision"] == "16" and is_cpu(device):
        raise ValueError("trainer.precision=16 needs a GPU; on a CPU choose bf16 or 32")
    return Fabric(
        accelerator=device,
        devices=here,
        num_nodes=processes // here,
        strategy="auto" if processes == 1 else "ddp" if started else "ddp_spawn",
        precision=PRECISIONS[trainer["precision"]],  # type: ignore[arg-type]
        plugins=None if started else [LightningEnvironment()],  # inside a Slurm job, Fabric would wait for tasks that nobody started
    )


class Started(NamedTuple):
    """Processes of one run that a launcher has started: by whom, how many, how many on this machine, and which of them this one is."""

    by: str
    total: int
    here: int
    rank: int


def started_by_launcher(processes: int) -> Started | None:
    """What torchrun or srun has started for a run of so many processes; None where the run starts its own.

    Raises:
        ValueError: if srun was not told how many tasks each machine has.
    """
    environment = os.environ
    if TorchElasticEnvironment.detect():
        total = int(environment["WORLD_SIZE"])
        return Started("torchrun", total, int(environment.get("LOCAL_WORLD_SIZE", total)), int(environment["RANK"]))
    total = int(environment.get("SLURM_STEP_NUM_TASKS", 1))  # of the srun step; a batch script of many tasks is one process
    if processes == 1 or total == 1 or not SLURMEnvironment.detect():
        return None
    if "SLURM_NTASKS_PER_NODE" not in environment:
        raise ValueError("srun has to say how many tasks each machine has; add --ntasks-per-node=NUMBER to it")
    return Started("srun", total, total // int(environment.get("SLURM_NNODES", 1)), int(environment["SLURM_PROCID"]))


def _launch(fabric: Fabric, plain: dict[str, Any], origin: Origin) -> dict[str, Any]:
    processes = plain["trainer"]["num_devices"]
    spawns = processes > 1 and started_by_launcher(processes) is None
    with _stop_signals_handed_on() if spawns else contextlib.nullcontext(), _own_port():
        outcome = fabric.launch(_spawned if spawns else _process, plain, origin)  # type: ignore[arg-type]  # it passes the arguments on
    if isinstance(outcome, BaseException):
        if fabric.global_rank > 0:
            time.sleep(LAST_WORDS_S)
        raise outcome
    return read_summary(Path(plain["output_dir"])) if spawns else outcome  # type: ignore[return-value]


@contextmanager
def _own_port() -> Iterator[None]:
    """Inside, Fabric may choose where processes meet; the next run of this process, in a multirun, chooses anew."""
    before = os.environ.get("MASTER_PORT")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MASTER_PORT", None)


LAST_WORDS_S = 3.0
"""Seconds that the first process of several has to say why they end: a launcher ends all when one has ended."""


@contextmanager
def _stop_signals_handed_on() -> Iterator[None]:
    """While spawned processes train, stopping is theirs: they are told by SIGTERM, and a terminal sends Ctrl-C to them too.

    This process waits until they have saved; a second Ctrl-C ends the waiting.
    """
    asked: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)
        for process in multiprocessing.active_children():
            process.terminate()

    try:
        with stop_signals_to(hand_on):
            yield
    except ProcessExitedException:
        if asked:  # it came before they listened, and before there was anything to save
            raise Interrupted from None
        raise


@sound_kernels()  # again for a spawned process, which knows nothing of its parent's settings
def _process(fabric: Fabric, plain: dict[str, Any], origin: Origin) -> Any:
    """What each process of a run does. With several, a user's error is returned: a spawned process could only raise its traceback."""
    try:
        # Processes that a launcher has started have each composed the configuration, and the default folder has the time in its name.
        own, folder = Path(plain["output_dir"]), Path(fabric.broadcast(plain["output_dir"]))
        plain = {**plain, "output_dir": str(folder)}
        if own != folder:
            with contextlib.suppress(OSError):
                own.rmdir()  # Hydra made it; empty
        with contextlib.ExitStack() as held:
            finished = None
            with failing_together():
                if fabric.is_global_zero and (finished := _finished(folder, plain)) is None:
                    # The process that writes, not the one that started it: either may be killed alone.
                    held.enter_context(run_folder.hold(folder))
                    finished = _finished(folder, plain)  # another process may have been at work here until now
            if (finished := fabric.broadcast(finished)) is not None:
                if fabric.is_global_zero:
                    _show_finished(folder, finished)
                return finished
            with failing_together():
                held.enter_context(_logging(folder, fabric.is_global_zero))
            return _train(fabric, plain, origin)
    except (*USER_ERRORS, Interrupted, KeyboardInterrupt) as error:
        if fabric.world_size == 1:
            raise
        return error


def _spawned(fabric: Fabric, plain: dict[str, Any], origin: Origin) -> BaseException | None:
    """`_process` without its summary, which the parent reads from the folder.

    What is returned goes through a pipe that is read when the process has ended: a long summary would fill it, and both would wait.
    """
    tolerate_any_encoding()
    outcome = _process(fabric, plain, origin)
    return outcome if isinstance(outcome, BaseException) else None


def _train(fabric: Fabric, plain: dict[str, Any], origin: Origin) -> dict[str, Any]:
    folder = Path(plain["output_dir"])
    reset_peak_memory(fabric.device)
    trackers = Trackers([])
    with failing_together():
        optimizer = _instantiate("optimizer", {key: value for key, value in plain["optimizer"].items() if key != "head_lr"})
        schedule = _instantiate("scheduler", plain["scheduler"])
        parts = build(fabric, plain)
        run_folder.check_begun(folder, parts.sequence, parts.backbone)
    _check_alike(plain, parts)
    with failing_together():
        if fabric.is_global_zero:  # when all have come this far
            trackers = Trackers([JsonlTracker(folder=folder), _instantiate("tracker", plain["tracker"], folder=folder)])
            # The last thing that may fail, since a finished run that is continued loses its summary here.
            run_folder.write_configuration(folder, plain, origin.hydra_files)
    records, failed = Records(parts.sequence.num_tasks, fabric.device), True
    try:
        trainer = Trainer(
            fabric,
            epochs=plain["trainer"]["epochs"],
            optimizer=optimizer,
            lr=plain["optimizer"]["lr"],
            head_lr=plain["optimizer"]["head_lr"],
            schedule=schedule,
            grad_clip=plain["trainer"]["grad_clip"],
            grad_accumulation=plain["trainer"]["grad_accumulation"],
            seed=plain["seed"],
            folder=folder,
            records=records,
            trackers=trackers,
            show_progress=plain["trainer"]["progress"],
        )
        trainer.run(parts.method, parts.sequence, _announce(parts, plain, origin))
        found = summary(plain, origin.names, parts.backbone, parts.sequence, parts.method, records)
        found |= _recipe(plain, origin)
        if fabric.is_global_zero:
            trackers.log("summary", found)
            write_atomically(folder / "summary.json", lambda file: file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n"))
            page = report.write([folder], folder / "report")
            report.print_table(found)
            print(f"Report: {page}")
        failed = False
    finally:
        trackers.close(failed=failed)
    return found


def _check_alike(plain: dict[str, Any], parts: Parts) -> None:
    """Each machine has composed the configuration and read weights and images by itself: all processes must have found the same.

    Raises:
        ValueError: if they have not, in every process.
    """
    found = gather_objects(plain | {"weights": parts.backbone.weights["tensors_sha256"], "images": parts.sequence.image_hashes})
    ignore = configuration.RESULT_FREE | {"backbone.checkpoint"}  # what the file holds is compared
    different = sorted({key for other in found for key in run_folder.config_differences(found[0], other, ignore)})
    if different:
        names = ", ".join(different)
        raise ValueError(f"the processes of this run differ in {names}; all machines need the same command, weights and images")


def _instantiate(group: str, config: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
    """Hydra's `instantiate` for the settings of a config group; errors that a constructor means for the user come through as they are.

    Raises:
        ConfigurationError: if a value has not the type that the constructor declares.
    """
    configuration.check_arguments(group, config)
    try:
        return instantiate(config, *arguments, _convert_="all", **keywords)
    except InstantiationException as error:
        if isinstance(error.__cause__, USER_ERRORS):
            raise error.__cause__ from None
        raise


def build(fabric: Fabric, plain: dict[str, Any], splits: Splits | None = None) -> Parts:
    """Load the data, where `splits` does not bring it, the backbone and the method of a resolved configuration."""
    data = plain["dataset"]
    if plain["trainer"]["compile"] and fabric.device.type == "mps":
        raise ValueError("trainer.compile=true does not work on mps; set trainer.compile=false")
    configuration.check_arguments("dataset", {"_target_": data["_target_"]})
    configuration.check_data_options(data["_target_"], data["options"])
    try:
        backbone, method = build_method(fabric, plain)
    except FileNotFoundError:
        load_images(data)  # where both are missing, the images are the larger errand: say that first
        raise
    # Whatever can fail without images comes before them: decoding may take minutes.
    mean, std = (backbone.mean, backbone.std) if data["normalize"] == "timm" else (None, None)
    transforms = build_transforms(data["transform"], backbone.image_size, mean, std)
    loading = Loading(
        device=fabric.device,
        batch_size=plain["trainer"]["batch_size"],
        eval_batch_size=plain["trainer"]["eval_batch_size"] or fabric.world_size * batch_without_training(backbone.model, fabric.device),
        seed=plain["seed"],
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        num_workers=plain["trainer"]["num_workers"],
    )
    splits = load_images(data) if splits is None else splits
    sequence = _sequence(plain, splits, transforms=transforms, loading=loading, stream=method.stream)
    if plain["trainer"]["grad_checkpointing"]:
        method.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    if plain["trainer"]["compile"]:
        method.backbone.compile()
    return Parts(fabric, sequence, backbone, method)


def _sequence(plain: dict[str, Any], splits: Splits, **options: Any) -> TaskSequence:
    """The tasks that a configuration makes of a data set."""
    data = plain["dataset"]
    return TaskSequence(
        splits,
        class_order=parse_class_order(data["class_order"], len(splits.class_names), plain["seed"]),
        task_sizes=split_task_sizes(len(splits.class_names), data["num_tasks"], data["task_sizes"]),
        validation_fraction=data["validation_fraction"],
        max_train_per_class=data["max_train_per_class"],
        max_test_per_class=data["max_test_per_class"],
        **options,
    )


def _check_images_of_finished(folder: Path, plain: dict[str, Any]) -> None:
    """A finished run is looked up from anywhere; but where images are in another root, they must be the ones it learned.

    Raises:
        ValueError: if they are not.
    """
    data = plain["dataset"]
    if getattr(get_method(data["_target_"]), "is_same_everywhere", False) or not Path(data["root"]).expanduser().exists():
        return
    try:
        splits = load_images(data)
    except FileNotFoundError:  # the folder is there, but not for this
        return
    loading = Loading(torch.device("cpu"), batch_size=1, eval_batch_size=1, seed=plain["seed"])
    transforms = build_transforms(data["transform"], 32, None, None)  # which nothing goes through
    run_folder.check_begun(folder, _sequence(plain, splits, transforms=transforms, loading=loading))


def load_images(data: dict[str, Any]) -> Splits:
    """The images of a resolved `dataset` group."""
    return get_method(data["_target_"])(Path(data["root"]).expanduser(), split=data["split"], **data["options"])


def build_method(fabric: Fabric, plain: dict[str, Any]) -> tuple[Backbone, Method]:
    """Load the backbone and the method of a resolved configuration, on the device, without images."""
    seed_everything(plain["seed"], "backbone")  # backbone.pretrained=false draws its weights
    backbone = build_backbone(**plain["backbone"], image_size=plain["dataset"]["image_size"])
    if fabric.device.type == "cpu" and plain["trainer"]["precision"] != "32":
        write_out_attention(backbone.model)
    seed_everything(plain["seed"], "method")
    method: Method = _instantiate("method", plain["method"], backbone.model)
    if plain["alignment"]["_target_"] is not None:
        method = _instantiate("alignment", plain["alignment"], method)
    return backbone, method.to(fabric.device)


def _announce(parts: Parts, plain: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Say what the run is about to do; returns the same as a record."""
    sequence, trainer = parts.sequence, plain["trainer"]
    steps = sum(-(-task.num_train // trainer["batch_size"]) for task in sequence) * trainer["epochs"]
    sizes = sequence.task_sizes
    plan = {
        **origin.names,
        "tasks": [task.class_names for task in sequence.tasks],
        "task_sizes": list(sizes),
        "training_images": [task.num_train for task in sequence.tasks],
        "test_counts": list(sequence.test_counts),
        "epochs": trainer["epochs"],
        "steps": steps,
        **_recipe(plain, origin),
        "test_hash": sequence.test_hash,
        "image_hashes": sequence.image_hashes,
        "weights": parts.backbone.weights,
    }
    classes = f"{sizes[0]} classes each" if len(set(sizes)) == 1 else "classes " + " ".join(map(str, sizes))
    stages = "one stage with all classes, tested on" if parts.method.stream == "joint" else "learned one after the other:"
    has_recipe = any(file.startswith("recipe/") for file in origin.applied_files)
    names = (origin.names[key] for key in ("method", "dataset", "backbone"))
    log.info("%s on %s, %s (%s weights: %s)", *names, parts.backbone.weights["source"], parts.backbone.tag)
    images = sum(plan["training_images"]), sum(sequence.test_counts)
    log.info("%s %d tasks, %s; %d training and %d test images", stages, len(sizes), classes, *images)
    log.info(
        "%d epochs a stage, batches of %d: %d steps on %s in precision %s",
        trainer["epochs"], trainer["batch_size"], steps, parts.fabric.device, trainer["precision"],
    )  # fmt: skip
    if plain["alignment"]["_target_"] is not None:
        log.info("after every task but the first, all heads are aligned on samples of the classes seen")
    log.info("applied: %s", ", ".join([*origin.applied_files, *([] if has_recipe else ["no published recipe for this pair"])]))
    for text, value in report.published_rows(plan["published"]):
        log.info("%s: %s", text, value)
    log.info("writing to %s", plain["output_dir"])
    return plan


def _recipe(plain: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """For the records: the files found by name, and what the recipe among them says of itself; None where none says anything."""
    published = plain.get("published") or {"source": None}  # a configuration of an earlier version has none
    return {
        "applied_files": origin.applied_files,
        "published": None if published["source"] is None else {**published, "changes": origin.changes},
    }


class LogFile(logging.FileHandler):
    """A log that a full disk leaves incomplete: the numbers and checkpoints that cannot be written then say so, in one sentence."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextmanager
def _logging(folder: Path, is_first: bool) -> Iterator[None]:
    """Show and keep the package's log messages while a run goes on, those of its first process; afterwards the loggers are as before."""
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        to_file = LogFile(folder / "run.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [to_file, ConsoleHandler()]
    level = log.level
    log.setLevel(logging.INFO)
    log.propagate = False  # Hydra's own handler would print every line again
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = True
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
