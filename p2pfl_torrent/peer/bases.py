"""The models that updates began from, and what this peer's own updates left out.

Of use only where the swarm sends changes (``chunk.delta``, ``topk``), or fills with them
(``bittorrent.fill: recycle``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import trio

from p2pfl_torrent.core.chunking import Layout, TensorSlice
from p2pfl_torrent.core.encoding import KeepUnsent
from p2pfl_torrent.core.manifest import Manifest, UpdateId
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, TensorSpec
from p2pfl_torrent.peer.catchup import CatchUp
from p2pfl_torrent.store import Checkpoints, Store, StoreError

MAX_FETCHED = 2  # bases in one round: each is a model to fetch, and in memory while it is merged
OWNERS_IN_TURN = 4  # that a base's patience is shared by: a large model needs a large share
KEPT_RESIDUALS = 2  # the one of the update that is being made, and the one before it


class Bases:
    """Finds the base that a manifest names: among the checkpoints of this peer, else at others.

    Args:
        initial: hash of the swarm's start weights.
        patience: seconds that fetching may take in one round.

    A base here is checked against its hash: one that is damaged counts as not here.
    """

    def __init__(
        self,
        store: Store,
        checkpoints: Checkpoints,
        catch_up: CatchUp,
        initial: bytes,
        patience: float,
    ) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._catch_up = catch_up
        self._initial = initial
        self._patience = patience

    async def of(self, manifests: Iterable[Manifest]) -> dict[UpdateId, Arrays | None]:
        """The base of each, mapped; None where it is not here."""
        named = {manifest.update: manifest.header.base_hash for manifest in manifests}
        found = {base: await self._find(base) for base in set(named.values())}
        return {update: found[base] for update, base in named.items()}

    async def fetch(
        self, manifests: Sequence[Manifest], bases: dict[UpdateId, Arrays | None]
    ) -> dict[UpdateId, Arrays | None]:
        """``bases`` with some of the missing ones, from the owners that have them.

        At most ``MAX_FETCHED`` models are taken, side by side, those first from which the most
        updates began. Each may take ``patience`` seconds, and an owner of it a share of them: who
        names a base that nobody has, or gives it slowly, keeps no other from being fetched.
        """
        missing = missing_of(bases)
        owners: defaultdict[bytes, list[PeerId]] = defaultdict(list)
        for manifest in manifests:
            if manifest.update in missing:
                owners[manifest.header.base_hash].append(manifest.owner)
        wanted = sorted(owners, key=lambda base: (-len(owners[base]), base))[:MAX_FETCHED]
        fetched: dict[bytes, Arrays] = {}

        async def fetch_one(base_hash: bytes) -> None:
            asked = sorted(set(owners[base_hash]))
            share = self._patience / min(len(asked), OWNERS_IN_TURN)
            for owner in asked:
                with trio.move_on_after(share):
                    found = await self._catch_up.fetch(owner, base_hash)
                    if found is not None:
                        fetched[base_hash] = found
                        return

        with trio.move_on_after(self._patience):
            async with trio.open_nursery() as nursery:
                for base_hash in wanted:
                    nursery.start_soon(fetch_one, base_hash)
        named = {manifest.update: manifest.header.base_hash for manifest in manifests}
        return {
            update: fetched.get(named[update]) if update in missing else base
            for update, base in bases.items()
        }

    async def _find(self, base_hash: bytes) -> Arrays | None:
        round = self.round_of(base_hash)
        if round is None or not self._checkpoints.path(round).exists():
            return None
        try:
            return await trio.to_thread.run_sync(self._checkpoints.load, round, base_hash)
        except StoreError:
            return None

    def round_of(self, base_hash: bytes) -> int | None:
        """The round that ended here with these weights, 0 for the swarm's first; None if none."""
        return 0 if base_hash == self._initial else self._store.round_of(base_hash)


def missing_of(bases: Mapping[UpdateId, Arrays | None]) -> set[UpdateId]:
    """The updates that cannot be read for want of their base."""
    return {update for update, base in bases.items() if base is None}


class Residuals:
    """What this peer's updates left out, kept so that a restart goes on adding it.

    ``<state>/unsent/checkpoints/round-N.safetensors``: after the update of round N, durable before
    that is published.
    """

    def __init__(self, state_dir: Path, layout: Layout) -> None:
        tensors = layout.spec.tensors
        floats = [index for index, tensor in enumerate(tensors) if tensor.is_float]
        self._place = {index: place for place, index in enumerate(floats)}
        spec = ModelSpec(
            tuple(
                TensorSpec(t.name, "F64" if t.dtype == "F64" else "F32", t.shape)
                for t in (tensors[index] for index in floats)
            )
        )
        self._kept = Checkpoints(state_dir / "unsent", spec)

    def before(self, round: int) -> Arrays | None:
        """What is left of the updates before a round; None if there was none, or it is damaged.

        What is not finite is 0: added to a change, it would keep every later update from being
        shared.
        """
        earlier = [kept for kept in self._kept.rounds() if kept < round]
        if not earlier:
            return None
        try:
            found = self._kept.load(earlier[-1])
        except StoreError:  # its loss costs some learning; refusing to go on would cost all
            return None
        return {
            name: array if np.isfinite(array).all() else np.where(np.isfinite(array), array, 0)
            for name, array in found.items()
        }

    @contextmanager
    def draft(self, round: int) -> Iterator[KeepUnsent]:
        """Takes what the update of a round leaves out, every slice of floats once."""
        with self._kept.draft(round) as draft:

            def keep(part: TensorSlice, rows: Array) -> None:
                draft.put(TensorSlice(self._place[part.tensor], part.start, part.stop), rows)

            yield keep
        self._kept.prune(KEPT_RESIDUALS)
