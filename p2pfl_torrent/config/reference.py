"""The reference of all keys, read from the schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass
from typing import Any, get_args

import yaml

from p2pfl_torrent.config.peer_config import PeerConfig
from p2pfl_torrent.config.schema import walk


@dataclass(frozen=True, slots=True)
class KeyReference:
    """A row of the reference: one key."""

    path: str
    type: str
    default: str
    scope: str
    meaning: str
    why: str


def reference() -> Iterator[KeyReference]:
    """Every key, in order."""
    for path, item, hint in walk(PeerConfig):
        bounds = str(item.metadata["bounds"])
        yield KeyReference(
            path,
            f"{_type_name(hint)}{_measured(hint) if bounds else ''}{bounds}",
            _default_text(item),
            item.metadata["scope"],
            item.metadata["meaning"],
            item.metadata["why"],
        )


def _measured(hint: Any) -> str:
    if hint is str:
        return ", characters: "
    return " " if hint in (int, float) else ", entries: "


def _default_text(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    else:
        value = item.default
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    return "empty" if text in ("''", "[]", "{}") else text


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _type_name(hint: Any) -> str:
    choices = get_args(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(choices)
    if hint in _NAMES:
        return _NAMES[hint]
    words = [_NAMES.get(choice) or _type_name(choice) for choice in choices]
    return f"list of {words[0]}" if len(words) == 1 else f"{words[0]}: {words[1]}"
