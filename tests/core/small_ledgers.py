"""Ledgers with a few updates, held chunks as text: "##......." for the first two of nine."""

from __future__ import annotations

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.ledger import Ledger
from p2pfl_torrent.core.manifest import Manifest
from tests.core.swarm_world import World

WORLD = World("abcd", edges=[])


def bits(text: str) -> Bitfield:
    field = Bitfield(len(text))
    for index, mark in enumerate(text):
        if mark == "#":
            field.add(index)
    return field


def update(round: int, owner: str = "a", salt: str = "") -> Manifest:
    return WORLD.update(owner, round, salt=salt)


def ledger(*held: tuple[Manifest, str], critical_share: float = 0.3) -> Ledger:
    made = Ledger(9, critical_share)
    for manifest, chunks in held:
        assert made.see(manifest.signed) is None
        made.add(manifest, bits(chunks))
    return made
