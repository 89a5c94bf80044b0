"""What people add of their own: models, LoRAs, rewards and gamma shapes from a TOML file or an installed package.

The file is $REWARDIV_REGISTRY, or rewardiv/registry.toml in the folder of settings ($XDG_CONFIG_HOME, ~/.config). A package
names, as an entry point of the group "rewardiv", a dict that holds what the file would. Both are read when something is
looked up, never at import, and a file that has changed is read again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rewardiv.errors import UserError, nearest

GROUP = "rewardiv"
VARIABLE = "REWARDIV_REGISTRY"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
GAMMA_NAME = re.compile(r"[a-z][a-z0-9-]*")  # what parse_gamma leaves of a name
BUILT_IN_GAMMAS = frozenset({"linear", "power", "step", "sigmoid", "cosine", "knots"})  # rewardiv.gamma's SHAPES
KEYS: dict[str, tuple[str, ...]] = {  # of each table; parameters is a table, everything else text
    "models": ("path", "hub", "family", "licence", "about"),
    "loras": ("path", "hub", "model", "reward", "family", "licence", "about"),
    "rewards": ("path", "function", "licence", "about"),
    "gammas": ("function", "parameters", "about"),
}
ONE_OF = {"models": ("path", "hub"), "loras": ("path", "hub"), "rewards": ("path", "function"), "gammas": ("function",)}

Function = Callable[..., object]


@dataclass(frozen=True)
class Addition:
    """One thing that somebody added.

    Attributes:
        name: As it is asked for.
        values: Its keys as they were written, checked against KEYS.
        place: The file or the package, and the key, for messages.
        folder: What relative paths start from; None for a package.
    """

    name: str
    values: Mapping[str, object]
    place: str
    folder: Path | None

    def text(self, key: str) -> str:
        """A key's text; "" where it isn't given."""
        return str(self.values.get(key, ""))

    def function(self) -> Function:
        """The function that `function` names, its module imported now.

        "module:function" is imported as any module, "file.py:function" is read from beside the registry file.

        Raises:
            UserError: If there is no such module or function, or importing it fails.
        """
        given = self.values["function"]
        if callable(given):
            return given
        module_name, _, name = str(given).partition(":")
        try:
            if module_name.endswith(".py"):
                path = (self.folder or Path()) / module_name
                module = _module_from(path, path.stat().st_mtime_ns)
            else:
                module = importlib.import_module(module_name)
            found = getattr(module, name)
        except Exception as error:  # somebody else's code, which may raise anything
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.place}: cannot import '{given}' ({type(error).__name__}: {reason})") from error
        if not callable(found):
            raise UserError(f"{self.place}: '{given}' is {found!r:.40}, not a function")
        return found

    def path(self) -> str:
        """The local path; a relative one starts from the registry file's folder."""
        return str((self.folder or Path()) / Path(self.text("path")).expanduser())


@dataclass(frozen=True)
class Extensions:
    """Everything that was added, by name."""

    models: Mapping[str, Addition]
    loras: Mapping[str, Addition]
    rewards: Mapping[str, Addition]
    gammas: Mapping[str, Addition]


def load() -> Extensions:
    """Read the registry file, where there is one, and the installed packages.

    Raises:
        UserError: If the file is missing where $REWARDIV_REGISTRY names it, cannot be read, a key is wrong (it is named),
            or a name is given twice.
    """
    path = registry_file()
    tables = dict(_packages(tuple(sys.path)))
    if path is not None:
        stat = path.stat()
        tables[str(path)] = (_read(path, stat.st_mtime_ns, stat.st_size), path.absolute().parent)
    found: dict[str, dict[str, Addition]] = {table: {} for table in KEYS}
    for place, (content, folder) in tables.items():
        for table, addition in _additions(content, place, folder):
            if (other := found[table].get(addition.name)) is not None:
                raise UserError(f"{addition.place}: the name is taken by {other.place}; choose another")
            found[table][addition.name] = addition
    return Extensions(**found)


def registry_file() -> Path | None:
    """The file that people add things in; None where there is none.

    Raises:
        UserError: If $REWARDIV_REGISTRY names a file that isn't there.
    """
    if given := os.environ.get(VARIABLE):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{VARIABLE} names {path}, and there is no such file; make it or unset {VARIABLE}")
        return path
    path = default_file()
    return path if path.is_file() else None


def default_file() -> Path:
    """Where the file is looked for without $REWARDIV_REGISTRY."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rewardiv" / "registry.toml"


@functools.lru_cache(maxsize=16)
def _read(path: Path, mtime_ns: int, size: int) -> dict[str, object]:
    """A TOML file's content, for as long as the file stays as it is."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:  # the message says the line
        raise UserError(f"{path} cannot be read: {error}") from error


@functools.lru_cache(maxsize=4)
def _packages(path: tuple[str, ...]) -> dict[str, tuple[dict[str, object], None]]:
    """What the packages on this `sys.path` add, by place."""
    return {f"package {_package(point)}, entry point {point.name}": (_content(point), None)
            for point in entry_points(group=GROUP)}


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _content(point: EntryPoint) -> dict[str, object]:
    try:
        found = point.load()
    except Exception as error:  # somebody else's code, which may raise anything
        raise UserError(f"package {_package(point)}: its entry point '{point.name} = {point.value}' cannot be loaded "
                        f"({type(error).__name__}: {error}); mend or uninstall it") from error
    if not isinstance(found, dict):
        raise UserError(f"package {_package(point)}: its entry point '{point.name} = {point.value}' is {found!r:.40}, "
                        f"not a dict of tables")
    return found


def _additions(content: Mapping[str, object], place: str, folder: Path | None) -> Iterator[tuple[str, Addition]]:
    for table, entries in content.items():
        if table not in KEYS:
            raise UserError(f"{place}: unknown table [{table}]{nearest(table, KEYS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{place}: {table} must be tables such as [{table}.mine], got {entries!r:.40}")
        for name, values in entries.items():
            addition = Addition(name, values, f"{place}: {table}.{name}", folder)
            _check(table, addition)
            yield table, addition


def _check(table: str, addition: Addition) -> None:
    place, values = addition.place, addition.values
    pattern = GAMMA_NAME if table == "gammas" else NAME
    if not pattern.fullmatch(addition.name):
        letters = "small letters, digits and -" if table == "gammas" else "letters, digits, . _ and -"
        raise UserError(f"{place}: the name must be made of {letters}")
    if table == "gammas" and addition.name in BUILT_IN_GAMMAS:
        raise UserError(f"{place}: the project itself has '{addition.name}'; choose another name")
    if not isinstance(values, dict):
        raise UserError(f"{place} must be a table with {' or '.join(ONE_OF[table])}, got {values!r:.40}")
    for key, value in values.items():
        if key not in KEYS[table]:
            raise UserError(f"{place}: unknown key '{key}'{nearest(key, KEYS[table])}")
        if key == "parameters":
            _check_parameters(place, value)
        elif not (isinstance(value, str) and value or key == "function" and callable(value)):
            raise UserError(f"{place}.{key} is {value!r:.40}; it must be text")
    if len([key for key in ONE_OF[table] if key in values]) != 1:
        raise UserError(f"{place} needs {' or '.join(ONE_OF[table])}, and only one of them")
    function = values.get("function", "module:function")
    if isinstance(function, str) and not re.fullmatch(r"[^:]+:\w+", function):
        raise UserError(f"{place}.function is '{function}'; write module:function or file.py:function")


def _check_parameters(place: str, value: object) -> None:
    """A gamma's numbers: name = [lowest, highest], in the order in which they are written after the name."""
    for span in value.values() if isinstance(value, dict) else [None]:
        numbers = isinstance(span, list) and len(span) == 2 and all(type(end) in (int, float) for end in span)
        if not numbers or not span[0] <= span[1]:
            raise UserError(f"{place}.parameters must name ranges such as {{ P = [0.5, 8.0] }}, got {value!r:.60}")


@functools.lru_cache(maxsize=64)
def _module_from(path: Path, mtime_ns: int) -> object:
    """The module in a file, for as long as the file stays as it is; it isn't put into sys.modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
