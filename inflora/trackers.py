"""Where a run's numbers go while it runs: `metrics.jsonl` and the accuracy matrices always, wandb or TensorBoard by choice.

An event has a name (`run`, `epoch`, `task`, `summary`, ...), values, and a step: its place among the run's events, 0-based. A
checkpoint holds the number of events so far, so that a resumed run can drop what was logged after it and log it again.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inflora.checkpoint import write_atomically, write_error

logger = logging.getLogger(__name__)


class Tracker:
    """Base class of the trackers `tracker=` chooses from. By itself it does nothing: `metrics.jsonl` is written in any case.

    Args:
        folder: the run folder.
    """

    def __init__(self, *, folder: str | Path) -> None:
        self.folder = Path(folder)

    def log(self, event: str, values: Mapping[str, Any], step: int) -> None:
        """Record one event."""

    def rewind(self, step: int) -> None:
        """Drop the events from `step` on, as far as that is possible: they will be logged again."""

    def close(self, *, failed: bool = False) -> None:
        """Finish writing; nothing is logged afterwards.

        Args:
            failed: whether the run has ended before its end.
        """


class Trackers:
    """Passes every event to all trackers, and counts the events.

    Args:
        trackers: the run's; empty in all but the first of several processes.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self._step = 0

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Record one event everywhere. Values may hold NumPy arrays, tensors and paths; what is not finite is recorded as null."""
        plain = to_plain(values)
        for tracker in self.trackers:
            tracker.log(event, plain, self._step)
        self._step += 1

    def position(self) -> int:
        """The number of events so far, for a checkpoint."""
        return self._step

    def rewind(self, position: int) -> None:
        """Go back to a checkpoint's position, or to 0 for a new run, before the first event is logged."""
        for tracker in self.trackers:
            tracker.rewind(position)
        self._step = position

    def close(self, *, failed: bool = False) -> None:
        for tracker in self.trackers:
            tracker.close(failed=failed)


class JsonlTracker(Tracker):
    """`metrics.jsonl`: one strict-JSON object a line, with `event` and `time` (seconds since 1970), on the disk when `log` returns.

    Args:
        folder: the run folder; made if missing.
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__(folder=folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.path.touch()
        self._keep(self._complete_lines())  # a kill may have cut the last line short; appending to it would spoil the next one too

    def log(self, event: str, values: Mapping[str, Any], step: int) -> None:
        """Raises WriteError if the line cannot be written (a full disk, say); no part of it then stays."""
        assert not values.keys() & {"event", "time"}, "names that every line has already"
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, allow_nan=False).encode() + b"\n"
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab", buffering=0) as file:
                while line:  # an unbuffered write may take only a part
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, size)
            raise write_error(self.path, error) from error

    def rewind(self, step: int) -> None:
        lines = self._complete_lines()
        if len(lines) < step:
            logger.warning("%s has %d lines where the checkpoint knows %d; the missing ones are lost", self.path, len(lines), step)
        self._keep(lines[:step])

    def _complete_lines(self) -> list[bytes]:
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def _keep(self, lines: list[bytes]) -> None:
        os.truncate(self.path, sum(len(line) for line in lines))


class WandbTracker(Tracker):
    """Weights & Biases. A resumed run continues the same wandb run; its id is in the run folder, in `wandb_id`.

    wandb ignores a step it already has, so what is logged again after a resume is not recorded twice.

    Args:
        folder: the run folder; wandb's own files go to `wandb/` in it.
        project: wandb project.
        entity: user or team; None: the account's default.
        group: groups runs, e.g. the seeds of one setting.
        mode: `online`, `offline` (send later with `wandb sync`) or `disabled`; None: the environment's WANDB_MODE, else `online`.
        tags: labels of the run.

    Raises:
        ValueError: if wandb is not installed, `mode` is unknown, or wandb cannot start (not logged in, say).
    """

    def __init__(
        self, *, folder: str | Path, project: str, entity: str | None, group: str | None, mode: str | None, tags: Sequence[str]
    ) -> None:
        super().__init__(folder=folder)
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"tracker.mode={mode} is not known; choose online, offline, disabled or null")
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _not_installed("wandb") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                group=group,
                mode=mode,
                tags=list(tags),
                id=self._id(),
                resume="allow",
                dir=self.folder,
                settings=wandb.Settings(console="off"),  # else it takes over the process's stdout and stderr
            )
        except wandb.Error as error:
            raise ValueError(f"tracker=wandb cannot start: {error}; log in with `wandb login`, or set tracker.mode=offline") from error

    def log(self, event: str, values: Mapping[str, Any], step: int) -> None:
        if event == "run":
            self._run.config.update(dict(values), allow_val_change=True)
        else:
            self._run.log(dict(numbers(values, event)), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))

    def _id(self) -> str:
        file = self.folder / "wandb_id"
        if not file.exists():
            write_atomically(file, lambda temporary: temporary.write_text(secrets.token_hex(4) + "\n"))
        return file.read_text().strip()


class TensorBoardTracker(Tracker):
    """TensorBoard event files in `tensorboard/` of the run folder.

    Args:
        folder: the run folder.

    Raises:
        ValueError: if tensorboard is not installed.
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__(folder=folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise _not_installed("tensorboard") from error
        self._open = SummaryWriter
        self._writer = self._open(str(self.folder / "tensorboard"))

    def log(self, event: str, values: Mapping[str, Any], step: int) -> None:
        if event == "run":
            self._writer.add_text("run", f"```json\n{json.dumps(values, indent=2)}\n```", step)
        else:
            for name, value in numbers(values, event):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(str(self.folder / "tensorboard"), purge_step=step)  # hides the old files' events from `step` on

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


def _not_installed(package: str) -> ValueError:
    return ValueError(f"tracker={package} needs the package {package}, which is not installed: pip install {package}")


def numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of nested values as ("task/accuracy", 81.5). Lists, texts, booleans and nulls are left to `metrics.jsonl`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


def to_plain(value: Any) -> Any:
    """A value as strict JSON can hold it: arrays and tensors as lists, paths as text, numbers that are not finite as None.

    Raises:
        TypeError: if there is no such form.
    """
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no form in JSON: {value!r}")


# ---- accuracy matrices -------------------------------------------------------------------------------------------------------------


def write_matrix(path: Path, accuracy: ArrayLike) -> None:
    """Write `accuracy_matrix.csv` or `task_aware_matrix.csv`: a header, and row i after task i, in percent with six decimals.

    Args:
        path: the file, replaced as a whole.
        accuracy: (T, T) fractions; nan where nothing was measured, which becomes an empty cell. Rows at the end that are all nan are left
            out: their tasks are still to come.
    """
    matrix = np.asarray(accuracy, dtype=np.float64)
    assert matrix.ndim == 2, "rows: after which task; columns: on which task"
    measured = np.flatnonzero(~np.isnan(matrix).all(axis=1))
    rows = matrix[: measured[-1] + 1] if len(measured) else matrix[:0]
    lines = [",".join(f"task_{j}" for j in range(matrix.shape[1]))]
    lines += [",".join("" if np.isnan(value) else f"{100 * value:.6f}" for value in row) for row in rows]
    write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def read_matrix(path: Path) -> NDArray[np.float64]:
    """Read what `write_matrix` wrote: (T, T) fractions, nan where nothing was measured.

    Raises:
        ValueError: if the file is not such a matrix.
    """
    header, *rows = path.read_text().splitlines() or [""]
    num_tasks = len(header.split(","))
    matrix = np.full((num_tasks, num_tasks), np.nan)
    for i, row in enumerate(rows):
        cells = row.split(",")
        if i >= num_tasks or len(cells) != num_tasks:
            raise ValueError(f"{path} is no accuracy matrix: line {i + 2} does not fit the {num_tasks} tasks of its header")
        matrix[i] = [float(cell) / 100 if cell else np.nan for cell in cells]
    return matrix
