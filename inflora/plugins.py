"""Configuration of installed third-party packages.

A package that declares an entry point in the group `inflora.conf`, whose value is its configuration package (say `my_package.conf`, holding
`method/my_method.yaml`), adds its choices to Hydra's search path: `method=my_method` then works with no change here.
"""

import functools
import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

ENTRY_POINT_GROUP = "inflora.conf"

log = logging.getLogger(__name__)


def own_conf() -> Path:
    """The project's conf/: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def plugin_packages() -> list[str]:
    """Configuration packages of installed plug-ins, sorted by the name of their entry point."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    return [point.value for point in points if _is_there(point)]


@functools.cache
def _is_there(point: EntryPoint) -> bool:
    """Whether the package can be found; of one whose folder is gone or has moved, a line says so, once."""
    try:
        files(point.value)
    except Exception as error:  # its code may raise anything, and commands that do not use it shall go on
        log.warning(
            "the plug-in %s is left out: its package %s cannot be imported (%s); reinstall or remove it", point.name, point.value, error
        )
        return False
    return True


class PluginSearchPath(SearchPathPlugin):
    """Appends the plug-ins' configuration packages to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in plugin_packages():
            search_path.append(provider="inflora-plugin", path=f"pkg://{package}")


def register() -> None:
    """Make Hydra use `PluginSearchPath`."""
    Plugins.instance().register(PluginSearchPath)


def choices(group: str) -> dict[str, str]:
    """The choices of a config group with their one-line descriptions, own ones first.

    The description is the first comment of the file that is no Hydra directive.
    """
    found: dict[str, str] = {}
    for root in conf_roots():
        folder = root / group
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda file: file.name):
                if file.name.endswith(".yaml"):
                    found.setdefault(file.name.removesuffix(".yaml"), _description(file.read_text(encoding="utf-8")))
    return found


def conf_roots() -> Iterator[Traversable]:
    """All folders that hold configuration, in Hydra's order."""
    yield own_conf()
    for package in plugin_packages():
        yield files(package)


def _description(text: str) -> str:
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")
