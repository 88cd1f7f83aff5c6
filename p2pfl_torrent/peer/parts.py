"""Makes the parts of a peer in one swarm, each from the configuration and what it stands on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.config.schema import ChosenMethod
from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.core.manifest import Manifest, decode_manifest
from p2pfl_torrent.core.membership import Membership
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.picker import PickerPolicy
from p2pfl_torrent.core.swarm import Swarm, SwarmPolicy
from p2pfl_torrent.core.tensors import ModelSpec
from p2pfl_torrent.core.uploads import UploadPolicy
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.overlay.identity import Identity, verify
from p2pfl_torrent.peer.bases import Residuals
from p2pfl_torrent.peer.catchup import CatchUp, OpenState
from p2pfl_torrent.peer.controls import OwnControls
from p2pfl_torrent.peer.feed import EventFeed
from p2pfl_torrent.peer.network import parse_bootstrap
from p2pfl_torrent.peer.rounds import Rounds
from p2pfl_torrent.peer.scoring import Gradients, ImportanceScorer
from p2pfl_torrent.store import Checkpoints, Store, keep_genesis


@dataclass(frozen=True, slots=True)
class Making:
    """What the parts of a peer are made from, whatever the swarm."""

    config: PeerConfig
    spec: ModelSpec
    layout: Layout
    identity: Identity
    state_dir: Path
    addrs: Sequence[str]
    rng: random.Random
    feed: EventFeed
    method: ChosenMethod
    gradients: Gradients | None

    @property
    def local(self) -> PeerId:
        """This peer."""
        return PeerId(self.identity.peer_id)

    def open_store(self, stack: ExitStack, genesis: Genesis) -> tuple[Store, Checkpoints]:
        """The state directory, used by this peer until the stack is closed.

        Raises:
            StoreError: it cannot be used for this swarm.
        """
        terms = genesis.terms.rounds

        def decode(data: bytes) -> Manifest:
            return decode_manifest(
                data,
                layout=self.layout,
                swarm=genesis.swarm_id,
                verify=verify,
                max_num_samples=terms.max_num_samples,
            )

        store = stack.enter_context(
            Store(
                self.state_dir,
                self.layout,
                swarm=genesis.swarm_id,
                # What may still be counted must be here then, whatever is kept for others.
                keep_rounds=max(self.config.storage.keep_rounds, terms.max_staleness),
                fill_max_age=self.config.bittorrent.fill_max_age,
                decode=decode,
            )
        )
        keep_genesis(self.state_dir, genesis)
        return store, Checkpoints(self.state_dir, self.spec)

    def swarm(self, genesis: Genesis) -> Swarm:
        """The machine that exchanges updates."""
        torrent = self.config.bittorrent
        policy = SwarmPolicy(
            picker=PickerPolicy(
                selection=torrent.chunk_selection,
                active_requests=torrent.active_requests,
                pending_chunks=torrent.pending_requests,
                endgame_holders=torrent.endgame_holders,
            ),
            uploads=UploadPolicy(upload_slots=torrent.upload_slots),
        )
        return Swarm(
            local=self.local,
            genesis=genesis,
            layout=self.layout,
            policy=policy,
            verify=verify,
            rng=self.rng,
        )

    def membership(self, genesis: Genesis) -> Membership:
        """The machine that knows who is there."""
        bootstrap = parse_bootstrap(self.config.network.bootstrap)
        return Membership(
            local=self.local,
            addrs=self.addrs[:16],
            swarm=genesis.swarm_id,
            seed=genesis.terms.seed,
            sign=self.identity.sign,
            verify=verify,
            rng=self.rng,
            now=trio.current_time(),
            rendezvous=[(peer, (address,)) for peer, address in bootstrap],
        )

    def catch_up(self, genesis: Genesis, open_state: OpenState) -> CatchUp:
        """What takes over others' state."""
        quorum = genesis.terms.rounds.quorum
        return CatchUp(self.spec, genesis.swarm_id, quorum, open_state, self.rng)

    def rounds(
        self,
        genesis: Genesis,
        store: Store,
        checkpoints: Checkpoints,
        exchange: Exchange,
        catch_up: CatchUp,
    ) -> Rounds:
        """What carries the model from round to round."""
        return Rounds(
            local=self.local,
            sign=self.identity.sign,
            genesis=genesis,
            layout=self.layout,
            store=store,
            checkpoints=checkpoints,
            exchange=exchange,
            catch_up=catch_up,
            scorer=ImportanceScorer(
                self.config.chunk, self.method, self.layout, self.rng, self.gradients
            ),
            feed=self.feed,
            enabled=self.config.bittorrent.enable,
            residuals=(
                Residuals(self.state_dir, self.layout)
                if self.layout.compression.keeps_unsent
                else None
            ),
            controls=(
                OwnControls(self.state_dir, self.layout.spec)
                if make_aggregator(genesis.terms.aggregator).has_controls
                else None
            ),
        )


async def restore(store: Store, exchange: Exchange) -> None:
    """Tell the machine what an earlier life of this peer left in the store, hashed again."""
    counted = store.counted()
    for manifest in store.manifests():
        blocks = await trio.to_thread.run_sync(_verified_blocks, store, manifest)
        held = Bitfield(len(manifest.entries))
        for chunk, verified in blocks.items():
            if verified.complete:
                held.add(chunk)
        if manifest.owner == exchange.swarm.local and not held.complete:
            # Cut short before it was published: nobody knows it, and the one that this round
            # will get must be the only one, or it looks like two.
            store.forget([manifest.update])
            continue
        counted_in = counted.get(manifest.update)
        exchange.feed(ev.Restored(manifest, held, blocks, counted_in))


def _verified_blocks(store: Store, manifest: Manifest) -> dict[int, Bitfield]:
    return {
        chunk: store.verified_blocks(manifest.update, chunk)
        for chunk in range(len(manifest.entries))
    }
