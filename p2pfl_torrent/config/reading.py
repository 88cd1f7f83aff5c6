"""From a YAML file to plain data with known keys, and msgspec's words made readable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml

from p2pfl_torrent.config.schema import walk
from p2pfl_torrent.core.errors import ConfigError

MAX_FILE_BYTES = 4 << 20  # a custom graph of thousands of members


class _Loader(yaml.SafeLoader):
    """YAML's plain data; a key that stands there twice is a mistake, not the last one's victory."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, Hashable) or name in result:
            what = f"{name} stands there twice" if isinstance(name, Hashable) else "not a key"
            raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
        result[name] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(file: Path) -> Any:
    """What a YAML file holds; ConfigError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigError(f"{file}: {reason}; give the path of a YAML file.") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_FILE_BYTES >> 20} MiB; is it the right file?")
    try:
        return yaml.load(data, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" near line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}: not valid YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{file}: not valid YAML; is it a text file?") from error


def known_keys(root: type[Any], data: object) -> dict[str, Any]:
    """The data with every key known and empty sections left out; ConfigError names a key."""
    return _known(root, root, data, "")


def _known(root: type[Any], kind: type[Any], data: object, prefix: str) -> dict[str, Any]:
    if data is None:
        return {}  # an empty file, or a section whose keys are all commented out
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{where} must hold keys with values, as in 'key: value'.")
    hints = get_type_hints(kind)
    result: dict[str, Any] = {}
    for name, value in data.items():
        path = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(_unknown(root, path))
        if is_dataclass(hints[name]):
            value = _known(root, cast("type[Any]", hints[name]), value, f"{path}.")
        result[name] = value
    return result


def _unknown(root: type[Any], path: str) -> str:
    parent, _, name = path.rpartition(".")
    known = [known for known, _, _ in walk(root)]
    beside = [key for key in known if key.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(path, beside, n=1, cutoff=0.75)
    close = close or [key for key in known if key.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "see docs/reference/configuration.md."
    return f"{path} is not a key; {hint}"


_WORDS = {
    "`int`": "a whole number", "`float`": "a number", "`str`": "text", "`bool`": "true or false",
    "`array`": "a list", "`object`": "keys with values", "`null`": "nothing",
}  # fmt: skip


def readable(root: type[Any], message: str, data: Mapping[str, Any]) -> str:
    """msgspec's ``Expected `int`, got `str` - at `$.chunk.num_chunks``` as one sentence."""
    what, _, where = message.partition(" - at ")
    path = (re.search(r"\$\.?([^`]*)", where) or [where, ""])[1]
    enum = re.fullmatch(r"Invalid enum value (.*)", what)
    if enum:
        hint = next(hint for known, _, hint in walk(root) if known == path)
        return f"{path} may not be {enum[1]}: use {' or '.join(get_args(hint))}."
    for code, words in _WORDS.items():
        what = what.replace(code, words)
    wanted, _, got = what.partition(", got ")
    found = _look_up(data, path)
    wanted = wanted.replace("Expected ", "must be ", 1)
    return f"{path} {wanted}, not {got if found is None else repr(found)}."


def _look_up(data: Any, path: str) -> Any:
    """The plain value at ``a.b[0]``, None where it is no plain value."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data if isinstance(data, (str, int, float)) else None
