"""Downloads that give up: whatever hangs (name look-up, connection, proxy, transfer), they end after some seconds without a byte."""

import hashlib
import itertools
import os
import platform
import queue
import ssl
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

STALL_S = 15.0
"""Seconds without a byte before a download gives up."""

ANSWER_S = 5.0
"""Seconds that a server has to answer a short question: with a download that stalls, still less than half a minute."""


def download(url: str, path: Path, md5: str) -> None:
    """Fetch `url` to `path`, which appears only when complete and of the right checksum.

    Raises:
        ConnectionError: with the reason, if nothing arrives for `STALL_S`, or the server or the checksum says no.
    """
    arriving = _arriving(urllib.request.Request(url), STALL_S)
    first = next(arriving)  # before anything is created on disk
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that share the folder, of this machine or others, do not write into each other's file.
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")
    checksum = hashlib.md5(usedforsecurity=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            open(partial, "wb") as file,
            Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
        ):
            bar = progress.add_task(f"downloading {path.name}", total=None)
            for total, block in itertools.chain([first], arriving):
                checksum.update(block)
                file.write(block)
                progress.update(bar, total=total or None, advance=len(block))
        if checksum.hexdigest() != md5:
            raise ConnectionError("the file that arrived is damaged (wrong checksum)")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_reachable(url: str) -> None:
    """Ask the server for the head of `url`, whatever it answers.

    Raises:
        ConnectionError: with the reason, if it does not answer within `ANSWER_S`.
    """
    if "all" in urllib.request.getproxies():  # by ALL_PROXY; other clients may get through where urllib does not
        return
    try:
        next(_arriving(urllib.request.Request(url, method="HEAD"), ANSWER_S))
    except ConnectionError as error:
        # Answers too: a status, and a certificate that urllib does not know but another client may.
        if not isinstance(error.__cause__, HTTPError) and not isinstance(getattr(error.__cause__, "reason", None), ssl.SSLError):
            raise


def _arriving(request: urllib.request.Request, patience: float) -> Iterator[tuple[int, bytes]]:
    """Pairs (bytes of the whole file or 0, next block), the last block empty, each within `patience` seconds."""
    blocks: queue.Queue[tuple[int, bytes] | Exception] = queue.Queue(maxsize=64)
    # A thread that may be abandoned: no socket timeout covers a hanging name look-up.
    threading.Thread(target=_fetch, args=(request, blocks), daemon=True).start()
    while True:
        try:
            item = blocks.get(timeout=patience)
        except queue.Empty:
            raise ConnectionError(f"nothing arrived for {patience:.0f} seconds") from None
        if isinstance(item, Exception):
            raise ConnectionError(str(getattr(item, "reason", item))) from item
        yield item
        if not item[1]:
            return


def _fetch(request: urllib.request.Request, blocks: "queue.Queue[tuple[int, bytes] | Exception]") -> None:
    """Put everything that arrives, or the exception, into `blocks`."""
    try:
        with urllib.request.urlopen(request, timeout=STALL_S) as response:
            if request.get_method() == "HEAD":  # urllib asks for everything where it is redirected: leave it there
                blocks.put((0, b""))
                return
            total = int(response.headers["Content-Length"] or 0)
            while block := response.read1(2**18):  # whatever is there: a slow transfer is no stall
                blocks.put((total, block))
            blocks.put((total, b""))
    except Exception as error:  # whatever it is, the waiting thread has to know
        blocks.put(error)
