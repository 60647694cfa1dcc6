"""The progress display of a run: task, epoch, loss, accuracy, images per second, time left."""

import logging
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from inflora.data.tasks import Task, TaskSequence
from inflora.method import Method

if TYPE_CHECKING:
    from inflora.trainer import Meter

REFRESH_SECONDS = 0.5

console = Console(stderr=True)
"""Where the display and the log messages go: one object, so that they do not overwrite each other."""


class ConsoleHandler(logging.Handler):
    """Prints log messages on `console`, one line each, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        try:
            console.print(label + self.format(record), markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # a terminal that has gone, a full disk behind it, a reader that has left (rich would end the run)
            console.quiet = True


class Display:
    """A progress bar over all training images of a run, drawn on standard error where that is a terminal.

    Args:
        sequence: the tasks, for their sizes.
        epochs: passes over each task.
        enabled: False draws nothing.
    """

    def __init__(self, sequence: TaskSequence, epochs: int, enabled: bool) -> None:
        self._sizes = [epochs * task.num_train for task in sequence]
        self._epochs = epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._bar = self._progress.add_task("", total=sum(self._sizes))

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start_task(self, task: Task, epoch: int) -> None:
        """A task begins, or goes on, with this epoch."""
        self._task = task
        self._images = 0
        self._began = self._looked = time.monotonic()
        done = sum(self._sizes[: task.index]) + epoch * task.num_train
        self._progress.update(self._bar, completed=done, description=f"task {task.index + 1}/{len(self._sizes)}")

    def step(self, images: int, meter: "Meter", method: Method) -> None:
        """A batch of this many images is done. The numbers are fetched from the device only when the display is redrawn."""
        self._images += images
        self._progress.advance(self._bar, images)
        now = time.monotonic()
        if self._progress.disable or now - self._looked < REFRESH_SECONDS:
            return
        self._looked = now
        right, answers = meter.hits(method)
        accuracy = f"{100 * right / answers:.1f} %" if answers else "-"
        self._progress.update(
            self._bar,
            description=f"task {self._task.index + 1}/{len(self._sizes)}  epoch {meter.epoch + 1}/{self._epochs}  "
            f"loss {meter.recent_loss():.3f}  accuracy {accuracy}  {self._images / (now - self._began):.0f} images/s",
        )
