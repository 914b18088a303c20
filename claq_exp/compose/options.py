"""Which options there are: those of the package, of its plugins and of a person's own folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from claq_exp.compose.places import packaged_folder
from claq_exp.errors import ConfigError

VERSION_BASE = "1.3"
PRIMARY = "config"
LAUNCHER = "hydra/launcher"
_OWN: ContextVar[tuple[Path, ...]] = ContextVar("own folders of options", default=())
_ADDED: ContextVar[tuple[str, ...]] = ContextVar("places that are looked into last", default=())


class OwnFolders(SearchPathPlugin):
    """Has Hydra look into a person's own folders first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put them before the folder of this package."""
        for folder in reversed(_OWN.get()):
            search_path.prepend("--config-dir", f"file://{folder}", anchor="main")
        for place in _ADDED.get():
            search_path.append("hydra.searchpath", place)


@cache
def prepare_hydra() -> None:
    """Make every file of `sweeps/` an option of the group `sweep`, once in a process."""
    Plugins.instance().register(OwnFolders)
    store = ConfigStore.instance()
    for path in sorted(packaged_folder("sweeps").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(group="sweep", name=path.stem, node=node, package="_global_")


@contextlib.contextmanager
def own_folders(folders: tuple[Path, ...]) -> Iterator[None]:
    """Find options in these folders too while this is open; they go before those of the package.

    Raises ConfigError for a folder that is none of options.
    """
    known = [*(path.name for path in packaged_folder("conf").iterdir() if path.is_dir()), "sweep"]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")
        if (folder / f"{PRIMARY}.yaml").exists():
            raise ConfigError(
                f"--config-dir {folder}: its {PRIMARY}.yaml would take the place of all defaults; "
                f"move what it sets to experiment/NAME.yaml and add experiment=NAME"
            )
        if not any((folder / group).is_dir() for group in known):
            raise ConfigError(
                f"--config-dir {folder} holds no folder of options; options of a group are files "
                f"in DIR/GROUP, e.g. DIR/experiment/NAME.yaml; groups: {', '.join(sorted(known))}"
            )
        known_sweeps = {path.name for path in packaged_folder("sweeps").glob("*.yaml")}
        for path in sorted((folder / "sweep").glob("*.yaml")):
            if path.name in known_sweeps:  # Hydra would mix the two
                raise ConfigError(f"{path}: a sweep of claq_exp has this name; choose another")
    token = _OWN.set(folders)
    try:
        yield
    finally:
        _OWN.reset(token)


def groups(places: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return config group -> its options, those of a person's own folders included.

    places: to look into last, as in `hydra.searchpath`.
    """
    token = _ADDED.set(tuple(places))
    try:
        with hydra_ready() as loader:
            sources = [source for source in loader.get_sources() if source.available()]
    finally:
        _ADDED.reset(token)
    top = {name for source in sources for name in _listed(source, "", ObjectType.GROUP)}
    found = {group: sorted(_options(sources, group)) for group in sorted(top - {"hydra"})}
    folder = packaged_folder("conf") / LAUNCHER  # beside those that plugins bring
    found[LAUNCHER] = sorted(path.stem for path in folder.glob("*.yaml"))
    return found


@contextlib.contextmanager
def hydra_ready() -> Iterator[ConfigLoader]:
    """Have Hydra know all options while this is open."""
    prepare_hydra()
    GlobalHydra.instance().clear()
    conf = str(packaged_folder("conf"))
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=conf):
        yield GlobalHydra.instance().config_loader()


def _options(sources: Sequence[ConfigSource], group: str) -> set[str]:
    """Return the options of a group, those in folders of the group included."""
    found: set[str] = set()
    for source in sources:
        found.update(_listed(source, group, ObjectType.CONFIG))
        for inner in _listed(source, group, ObjectType.GROUP):
            found.update(f"{inner}/{name}" for name in _options([source], f"{group}/{inner}"))
    return found


def _listed(source: ConfigSource, group: str, kind: ObjectType) -> list[str]:
    return source.list(group, kind) if not group or source.is_group(group) else []
