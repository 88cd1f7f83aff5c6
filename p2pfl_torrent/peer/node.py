"""One peer, wired: host, gossip, membership, store, exchange and rounds under one nursery."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import trio

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.architecture import Architecture
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.genesis import Genesis
from p2pfl_torrent.core.joining import Welcome
from p2pfl_torrent.core.manifest import max_wire_bytes
from p2pfl_torrent.core.membership_effects import Member
from p2pfl_torrent.core.messages import (
    MAX_CONTROL_FRAME,
    REFUSE_MEMBER,
    REFUSE_SWARM,
    Hello,
    Refuse,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import (
    Joined,
    Left,
    MemberChanged,
    PeerEvent,
    PeerStatistics,
    RoundFinished,
    RoundReport,
    TrainingProgress,
)
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec, model_hash
from p2pfl_torrent.core.topology import neighbours, overlay_seed
from p2pfl_torrent.exchange.driver import Exchange, TaskStatus
from p2pfl_torrent.exchange.membership import MembershipDriver
from p2pfl_torrent.exchange.ports import ByteStream, EdgeClosedError
from p2pfl_torrent.overlay.gossip import Gossip, GossipCounters
from p2pfl_torrent.overlay.host import Host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.stream import Stream
from p2pfl_torrent.peer.adapters import HostDialer, StreamPort, open_stream
from p2pfl_torrent.peer.entering import Entering, Start
from p2pfl_torrent.peer.feed import EventFeed
from p2pfl_torrent.peer.network import (
    HostNetwork,
    Welcomed,
    find_swarm,
    founded,
    read_welcome,
)
from p2pfl_torrent.peer.overlap import Overlap
from p2pfl_torrent.peer.parts import Making, restore
from p2pfl_torrent.peer.rounds import Merged
from p2pfl_torrent.peer.scoring import Gradients, chosen_method
from p2pfl_torrent.peer.snapshot import take_statistics
from p2pfl_torrent.peer.topics import Topics
from p2pfl_torrent.protocols import chunk as chunk_protocol
from p2pfl_torrent.protocols import members as members_protocol
from p2pfl_torrent.protocols import state as state_protocol
from p2pfl_torrent.store import (
    StoreError,
    forget_swarm,
    load_genesis,
)

PROTOCOLS = (chunk_protocol.PROTOCOL_ID, members_protocol.PROTOCOL_ID, state_protocol.PROTOCOL_ID)


class Node:
    """A peer's parts and the life they share; the faces (``Peer``, ``AsyncPeer``) drive it.

    Args:
        weights: the start weights this peer would begin a swarm with.
        on_address: told each of the peer's addresses once it listens.
        gradients: statistics of the user's training, where the importance method needs them.
        parameters: names of the tensors that training moves, for ``federate.overlap``.
    """

    def __init__(
        self,
        config: PeerConfig,
        spec: ModelSpec,
        weights: dict[str, Array],
        on_address: Callable[[str], object] | None = None,
        gradients: Gradients | None = None,
        architecture: Architecture | None = None,
        parameters: Collection[str] = (),
    ) -> None:
        self.config = config
        self._gradients = gradients
        self._method = chosen_method(config.chunk, architecture, gradients)
        self._model_spec, self._parameters = spec, parameters
        self.feed = EventFeed()
        self.peer_id = ""
        self.addrs: tuple[str, ...] = ()
        self.total_rounds = config.federate.total_round_num
        self._on_address = on_address
        aggregator = make_aggregator(config.federate.aggregator)
        update = aggregator.update_spec(spec)
        self._spec = aggregator.state_spec(update)
        self._spec.validate()
        state = aggregator.first_state(update, weights)
        self._start: Start | None = Start(state, model_hash(self._spec, state))
        self._layout = config.plan_layout(spec, architecture)
        self._terms = config.terms(spec, self._layout)
        self._initial_hash = self._start.hash
        self._rng = random.Random(f"{config.swarm.seed}/{os.urandom(8).hex()}")
        self._stack = ExitStack()
        self._is_open = False
        self._better: Welcomed | None = None
        self._waiting = trio.CancelScope()  # for the first members
        self._members: dict[PeerId, Member] = {}

    # --- starting ----------------------------------------------------------------------------

    def open_identity(self) -> Identity:
        """This peer's key, from its state directory or made for this run."""
        if self.config.storage.state_dir:
            self._dir = Path(self.config.storage.state_dir)
            _make_directory(self._dir)
        else:
            temporary = tempfile.TemporaryDirectory(prefix="p2pfl-torrent-")
            self._dir = Path(self._stack.enter_context(temporary))
        self._identity = Identity.load_or_create(self._dir / "identity.key")
        self.peer_id = self._identity.peer_id
        return self._identity

    async def find(self, host: Host, gossip: Gossip) -> Welcomed:
        """Find the swarm, or found it."""
        self._host, self._gossip = host, gossip
        self.addrs = tuple(self.config.network.announce) or host.addrs()
        if self._on_address is not None:
            for address in self.addrs:
                self._on_address(address)
        proposed = self._kept_genesis() or Genesis(
            self._terms, self.config.new_run_id(), self.peer_id, self._initial_hash.hex()
        )
        if not self.config.network.bootstrap or not self.config.bittorrent.enable:
            return founded(proposed)
        attempts = self.config.topology.max_connection_attempts
        return await find_swarm(
            host, self.config.network.bootstrap, self._terms, proposed, attempts
        )

    async def start(self, nursery: trio.Nursery, found: Welcomed) -> Welcomed | None:
        """Enter the swarm, take its state, and return when a round may be trained.

        Returns:
            Another swarm of the same terms, where this one must give way to it before round 1;
            nothing else may be done then but to cancel the nursery and ``give_way``.
        """
        self._nursery = nursery
        genesis = found.genesis
        self._open_parts(genesis)
        await restore(self._store, self._exchange)  # before anybody can ask for it
        self._serve()
        nursery.start_soon(self._topics.publish)
        nursery.start_soon(self._topics.follow, self._exchange, self._driver)
        await nursery.start(self._exchange.run)  # type: ignore[arg-type]  # trio's own protocol
        await nursery.start(self._run_members)  # type: ignore[arg-type]  # likewise
        if found.via is not None:
            self._driver.record_received(found.statements, found.via)
        self.feed.emit(
            Joined(genesis.swarm_id.hex(), PeerId(self.peer_id), 0, len(self._members) + 1)
        )
        assert self._start is not None
        entering = Entering(
            genesis=genesis,
            start=self._start,
            store=self._store,
            checkpoints=self._checkpoints,
            exchange=self._exchange,
            driver=self._driver,
            catch_up=self._catch_up,
            rounds=self._rounds,
        )
        if not self.config.bittorrent.enable:
            await entering.begin_alone()
        elif not await entering.enter_running():
            with trio.CancelScope() as self._waiting:
                if self._better is None:
                    await entering.begin_with_others(self.config.topology.timeout)
            if self._better is not None and not self._rounds.round:
                return self._better
        self._start = None  # the checkpoint holds its weights from here on
        return None

    def _other_swarm(self, welcome: Welcome, via: PeerId) -> None:
        """Two swarms of our terms are known; decide which goes on, as all do who learn of it."""
        if self._rounds.round:
            return
        try:
            other = read_welcome(welcome, via, self._terms)
        except RemoteProtocolError as error:
            self._fault(via, error.reason)
            return
        ours = Welcomed.of(self._genesis, self._driver.machine.census)
        if not ours.begun and other.rank < ours.rank:
            self._better = other
            self._waiting.cancel()

    async def give_way(self) -> None:
        """Forget a swarm of which no round has begun, so that another can be entered."""
        for protocol in PROTOCOLS:
            self._host.remove_handler(protocol)
        await self._topics.leave()
        for peer in self._host.connected():
            await self._host.disconnect(peer)
        self._parts.close()
        forget_swarm(self._dir)
        self._members, self._better = {}, None

    def _kept_genesis(self) -> Genesis | None:
        """The genesis of an earlier life in the same swarm, so that a restart finds itself."""
        genesis = load_genesis(self._dir)
        return genesis if genesis is not None and genesis.terms == self._terms else None

    def _open_parts(self, genesis: Genesis) -> None:
        self._genesis, self._swarm_id = genesis, genesis.swarm_id
        self._parts = self._stack.enter_context(ExitStack())
        making = Making(
            config=self.config,
            spec=self._spec,
            layout=self._layout,
            identity=self._identity,
            state_dir=self._dir,
            addrs=self.addrs,
            rng=self._rng,
            feed=self.feed,
            method=self._method,
            gradients=self._gradients,
        )
        self._topics = Topics(self._gossip, self._swarm_id, PeerId(self.peer_id))
        self._store, self._checkpoints = making.open_store(self._parts, genesis)
        self._max_control = max(MAX_CONTROL_FRAME, max_wire_bytes(self._layout))
        dialer = HostDialer(self._host, self._max_control)
        self._exchange = Exchange(making.swarm(genesis), self._store, dialer, self, self._rng)
        self._driver = MembershipDriver(
            making.membership(genesis),
            genesis,
            HostNetwork(self._host, self._gossip, self._topics.members),
            on_change=self._member_changed,
            on_roster=self._roster_changed,
            on_fault=self._fault,
            on_other_swarm=self._other_swarm,
        )
        self._catch_up = making.catch_up(genesis, self._open_state)
        self._rounds = making.rounds(
            genesis, self._store, self._checkpoints, self._exchange, self._catch_up
        )
        self._overlap = self._make_overlap() if genesis.terms.overlap else None
        self._is_open = True

    def _make_overlap(self) -> Overlap:
        return Overlap(
            self._rounds,
            spec=self._model_spec,
            parameters=self._parameters,
            total=self.total_rounds,
            nursery=self._nursery,
            ended=self._round_ended,
            told=self.finished,
        )

    # --- the user's calls --------------------------------------------------------------------

    @property
    def round(self) -> int:
        """The round that the user trains or exchanges now."""
        return self._rounds.round if self._overlap is None else self._overlap.round

    def start_weights(self) -> dict[str, Array]:
        """The weights the current round starts from, with the controls where there are some."""
        return self._rounds.weights(self._checkpoints.load(self._rounds.round - 1))

    def own_controls(self) -> Arrays | None:
        """This peer's control variates to train the current round with; None for zeros."""
        return self._rounds.own_controls()

    async def exchange(
        self, arrays: dict[str, Array], num_samples: int, metrics: Mapping[str, float]
    ) -> Merged:
        """Share an update and merge; see ``Rounds.exchange`` and ``Overlap.exchange``."""
        began = trio.current_time()
        if self._overlap is not None:
            return await self._overlap.exchange(arrays, num_samples, metrics, began)
        merged = await self._rounds.exchange(arrays, num_samples, metrics, began)
        self._round_ended(merged.report)
        return merged

    def _round_ended(self, report: RoundReport) -> None:
        """Another round has begun here: tell the members, and draw what depends on it."""
        self._driver.round_changed(self._rounds.round)
        if self._terms.topology.redraw:
            self._draw_overlay()
        if report.late:
            self._came_back(report.round)

    def _came_back(self, missed: int) -> None:
        """We caught up after a round went on without us: say from when to wait for us again.

        Who only was slow has kept its place, a hub stays hub, and is waited for as before. Who was
        given up has taken the last place meanwhile (its record names a round after the missed one),
        and now names the round after the one it caught up to, as a joiner does. In that one it
        begins late: the others may be about to close it, and would wait until its deadline for one
        who may not make it. They count its update if it comes in time, as a late one if not, and
        wait for it in the next, which it begins when it has closed this one. Who misses that too
        comes by here again, so one that freezes again and again holds up nobody.
        """
        own = self._members.get(PeerId(self.peer_id))
        if own is not None and own.joined_round > missed:
            self._driver.set_ready(self._rounds.round + 1)

    def finished(self, report: RoundReport) -> None:
        """The aggregate is in the user's model, or is known to be there by the next call."""
        if not report.underway:
            self.feed.emit(RoundFinished(report))

    def progress(self, done: int, total: int, loss: float | None) -> None:
        """Training has got so far."""
        self.feed.emit(TrainingProgress(self.round, done, total, loss))

    def statistics(self) -> PeerStatistics:
        """A snapshot."""
        return take_statistics(
            self._exchange,
            swarm_id=self._swarm_id,
            round=self._rounds.round,
            total_rounds=self.total_rounds,
            phase=self._rounds.phase,
            topology=self._terms.topology.type,
            members=tuple(self._members),
            now=trio.current_time(),
        )

    @property
    def gossip_counters(self) -> GossipCounters:
        """What has come and gone by gossip so far; it goes on counting."""
        return self._gossip.counters

    def snapshot(self) -> PeerStatistics | None:
        """``statistics``; None while there are none yet."""
        return self.statistics() if self._is_open else None

    # --- the end -----------------------------------------------------------------------------

    async def finish(self) -> None:
        """Serve the neighbours until they have what they need, then say goodbye."""
        if self._overlap is not None:  # what is published is not taken away before its time
            with trio.move_on_after(self.config.bittorrent.linger):
                await self._overlap.drain()
        self._rounds.phase = "seeding"
        if self._rounds.round > self.total_rounds:
            with trio.move_on_after(self.config.bittorrent.linger):
                await self._exchange.until(self._exchange.swarm.others_have_all)
        await self._driver.leave()

    def close(self, reason: str) -> None:
        """Release the state directory and say so."""
        self._stack.close()
        if self._is_open:
            self._rounds.phase = "stopped"
        self.feed.emit(Left(reason))

    # --- members and overlay -----------------------------------------------------------------

    async def _run_members(self, task_status: TaskStatus) -> None:
        await self._driver.run(task_status=task_status)

    def _member_changed(self, event: MemberChanged) -> None:
        if event.member == self.peer_id:
            return  # Joined and Left tell of this peer
        self.feed.emit(event)
        if event.change in ("dead", "left"):
            self._exchange.forget_peer(event.member)

    def _roster_changed(self, roster: tuple[Member, ...]) -> None:
        """Who is here changed: tell the machine, and draw the overlay anew."""
        self._members = {member.peer: member for member in roster}
        machine = self._driver.machine
        live = {member.peer: member.joined_round for member in roster}
        self._exchange.feed(ev.MembersNow(live, machine.dead()))
        self._draw_overlay()

    def _draw_overlay(self) -> None:
        local = PeerId(self.peer_id)
        if local not in self._members:
            return
        topology = self._terms.topology
        seed = overlay_seed(self._genesis.terms.seed, topology, self._rounds.round)
        overlay = neighbours(list(self._members), topology, seed)
        near = {peer: self._members[peer].addrs for peer in overlay.get(local, ())}
        self._exchange.set_neighbours(near)
        self._driver.watch(near)
        self._topics.set_neighbours(near)

    # --- protocols ---------------------------------------------------------------------------

    def _serve(self) -> None:
        async def chunks(stream: Stream) -> None:
            port = StreamPort(stream)
            await self._exchange.serve(chunk_protocol.ChunkChannel(port, self._max_control))

        async def members(stream: Stream) -> None:
            try:
                await members_protocol.serve_members(StreamPort(stream), self._driver.answer)
            except RemoteProtocolError as error:
                self._fault(PeerId(stream.remote), error.reason)

        async def state(stream: Stream) -> None:
            try:
                await state_protocol.serve_state(StreamPort(stream), self._swarm_id, self)
            except EdgeClosedError:
                pass  # the asker is gone
            except RemoteProtocolError as error:
                self._fault(PeerId(stream.remote), error.reason)

        for protocol, handler in zip(PROTOCOLS, (chunks, members, state), strict=True):
            self._host.set_handler(protocol, handler)

    async def _open_state(self, peer: PeerId) -> ByteStream:
        addrs = self._driver.machine.addrs(peer)
        return await open_stream(self._host, peer, addrs, state_protocol.PROTOCOL_ID)

    def current_state(self) -> tuple[int, bytes, int] | None:
        """What the state protocol offers: round, start weights' hash, checkpoint bytes."""
        round = self._rounds.round
        size = self._checkpoint_size(max(0, round - 1))
        return None if size is None else (round, self._rounds.base_hash, size)

    def kept_state(self, base_hash: bytes) -> tuple[int, int] | None:
        """Start weights of an earlier round, where others may need them to read a change."""
        if not self._rounds.keeps_bases:
            return None
        before = self._rounds.bases.round_of(base_hash)
        size = None if before is None else self._checkpoint_size(before)
        return None if before is None or size is None else (before + 1, size)

    def _checkpoint_size(self, round: int) -> int | None:
        """Bytes of a round's checkpoint; None where it is not, or was pruned just now."""
        try:
            return self._checkpoints.path(round).stat().st_size
        except OSError:
            return None

    def read_state(self, round: int, offset: int, size: int) -> bytes:
        """Bytes of the checkpoint that a round starts from."""
        with self._checkpoints.path(max(0, round - 1)).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    # --- what the exchange asks and tells ----------------------------------------------------

    def hello(self, wanted: bool) -> Hello:
        """Our Hello for a new chunk stream."""
        return Hello(self._swarm_id, self._rounds.round, wanted, self._driver.machine.record())

    def admit(self, peer: PeerId, hello: Hello) -> Refuse | None:
        """Judge a neighbour's Hello."""
        if hello.swarm != self._swarm_id:
            return Refuse(REFUSE_SWARM, self._genesis.encode().decode())
        if self.config.security.allow and peer not in self.config.security.allow:
            return Refuse(REFUSE_MEMBER, "this peer exchanges with a list of peers only")
        self._driver.record_received(hello.record, peer)
        return None

    def heard(self, peer: PeerId) -> None:
        """Bytes came from a peer."""
        self._driver.heard(peer)

    def edge_lost(self, peer: PeerId) -> None:
        """A stream to a peer broke."""
        self._driver.edge_lost(peer)

    def dropped(self, peer: PeerId, reason: str) -> None:
        """A peer broke the protocol: close its connection."""
        self._nursery.start_soon(self._host.disconnect, peer)

    def _fault(self, peer: PeerId, reason: str) -> None:
        self._exchange.blame(RemoteProtocolError(reason, peer))

    def emit(self, event: PeerEvent) -> None:
        """Tell the user."""
        self.feed.emit(event)

    def gossip_manifest(self, data: bytes) -> None:
        """Publish on the manifest topic."""
        self._topics.queue_manifest(data)

    def gossip_availability(self, data: bytes) -> None:
        """Publish on our availability topic."""
        self._topics.queue_availability(data)


def _make_directory(state_dir: Path) -> None:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file is in its way"
        raise StoreError(
            f"storage.state_dir: {state_dir} cannot be made ({reason}); name a directory that this "
            "user may write."
        ) from error
