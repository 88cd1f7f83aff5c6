"""``<state>/genesis.json``: which swarm a state directory belongs to."""

from __future__ import annotations

from pathlib import Path

from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis, decode_genesis
from p2pfl_torrent.store.durable import replace_file
from p2pfl_torrent.store.errors import StoreError


def load_genesis(state_dir: Path) -> Genesis | None:
    """The genesis of an earlier life in the same directory, None where there was none.

    Raises:
        StoreError: it is damaged.
    """
    path = _path(state_dir)
    try:
        return decode_genesis(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, RemoteProtocolError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete {state_dir} except identity.key, and the peer "
            "takes the current model from its neighbours."
        ) from error


def keep_genesis(state_dir: Path, genesis: Genesis) -> None:
    """Keep the genesis; where it is kept already, nothing is written.

    Raises:
        StoreError: the disk is full or fails.
    """
    path, data = _path(state_dir), genesis.encode()
    if not path.exists() or path.read_bytes() != data:
        replace_file(path, [data])


def forget_swarm(state_dir: Path) -> None:
    """Delete what a closed store, its checkpoints and its genesis have left of a swarm."""
    for pattern in ("chunks.sqlite*", "updates/*", "checkpoints/*", _path(state_dir).name):
        for path in state_dir.glob(pattern):
            path.unlink()


def _path(state_dir: Path) -> Path:
    return state_dir / "genesis.json"
