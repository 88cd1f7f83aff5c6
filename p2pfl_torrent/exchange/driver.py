"""Drives one swarm machine: feeds it what the streams, the gossip and the clock bring, and does
what it answers. One nursery owns every task; decisions and their effects are one synchronous step.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.errors import RemoteProtocolError
from p2pfl_torrent.core.messages import (
    REFUSE_BANNED,
    Hello,
    Message,
    Piece,
    Ping,
    Pong,
    Refuse,
    Reject,
)
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import EdgeChanged, PeerEvent
from p2pfl_torrent.core.serving import Upload
from p2pfl_torrent.core.swarm import Swarm
from p2pfl_torrent.exchange.edges import MAX_TOGETHER, Edge, Lane, OutboxFullError
from p2pfl_torrent.exchange.ports import Channel, Dialer, EdgeClosedError, UpdateStore
from p2pfl_torrent.exchange.spares import Spares

PING_INTERVAL = 1.0  # seconds of silence after which a holder is asked for a sign of life
HELLO_PATIENCE = 15.0  # seconds for one small message; a slow start at 0.1 CPU is in it
FIRST_RETRY = 0.05  # seconds; a restarting process is back within tenths
MAX_RETRY = 5.0  # seconds between two dials of a neighbour that is not there
FIRST_DIAL_HEADSTART = 0.3  # seconds the lower PeerId has to dial, so that both rarely do at once
MIN_TICK = 0.005  # seconds; no timer needs more, and a mistake must not spin
SMALL_PIECE = 4 << 10  # bytes; of these, several are sent in one write
MAX_EDGES = 2048  # kept, if only to be counted: of all members there may be, and of as many others
MAX_BANNED = 4096  # the last to be dropped; new names cost nothing and must not fill a table


class TaskStatus(Protocol):
    """trio's, which has no public type that all its versions share."""

    def started(self) -> None:
        """The task is up."""
        ...


class Surroundings(Protocol):
    """What the driver asks of and tells the peer around it."""

    def hello(self, wanted: bool) -> Hello:
        """Our Hello for a new stream."""
        ...

    def admit(self, peer: PeerId, hello: Hello) -> Refuse | None:
        """Judge a Hello: None lets the exchange begin."""
        ...

    def heard(self, peer: PeerId) -> None:
        """Bytes came from a peer: it lives."""
        ...

    def edge_lost(self, peer: PeerId) -> None:
        """A stream to a peer broke: it may be gone."""
        ...

    def dropped(self, peer: PeerId, reason: str) -> None:
        """A peer broke the protocol; its connection is to be closed."""
        ...

    def emit(self, event: PeerEvent) -> None:
        """Tell the user."""
        ...

    def gossip_manifest(self, data: bytes) -> None:
        """Publish on the manifest topic, soon."""
        ...

    def gossip_availability(self, data: bytes) -> None:
        """Publish on our availability topic, soon."""
        ...


@dataclass(slots=True)
class _Keeper:
    """The task that keeps our stream to one neighbour open."""

    addrs: Sequence[str]
    scope: trio.CancelScope


class Exchange:
    """The running exchange of one peer."""

    def __init__(
        self,
        swarm: Swarm,
        store: UpdateStore,
        dialer: Dialer,
        surroundings: Surroundings,
        rng: random.Random,
    ) -> None:
        self.swarm = swarm
        self.edges: dict[PeerId, Edge] = {}
        self.forgotten = Edge(swarm.local)  # the bytes of all edges that are kept no more
        self._store = store
        self._dialer = dialer
        self._around = surroundings
        self._rng = rng
        self._wanted: dict[PeerId, Sequence[str]] = {}
        self._retiring: dict[PeerId, Sequence[str]] = {}
        self._keepers: dict[PeerId, _Keeper] = {}
        self._banned: dict[PeerId, float] = {}
        self._nursery: trio.Nursery | None = None
        self._timer = trio.Event()
        self._tick_at = 0.0
        self._spares = Spares()
        self._outcome: ev.CloseRound | ev.MissedRound | None = None
        self._over = trio.Event()
        self._moved = trio.Event()

    # --- life --------------------------------------------------------------------------------

    async def run(self, task_status: TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, fetch and keep the edges until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._tick)
            task_status.started()
            await trio.sleep_forever()

    async def _tick(self) -> None:
        while True:
            now = trio.current_time()
            self._tick_at = max(now + MIN_TICK, self.swarm.next_wakeup(now))
            with trio.move_on_at(self._tick_at) as waiting:
                await self._timer.wait()
            if waiting.cancelled_caught:
                self.feed(ev.Tick())
                self._wake_writers()
            else:
                self._timer = trio.Event()

    def feed(self, stimulus: ev.Stimulus) -> None:
        """Tell the machine, and do what it answers, at once."""
        now = trio.current_time()
        self._apply(self.swarm.handle(stimulus, now), now)
        if self.swarm.next_wakeup(now) < self._tick_at:
            self._timer.set()
        self._moved.set()
        self._moved = trio.Event()

    async def outcome(self) -> ev.CloseRound | ev.MissedRound:
        """How the round that is being exchanged ends."""
        await self._over.wait()
        self._over = trio.Event()
        assert self._outcome is not None
        return self._outcome

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the machine or the edges holds."""
        while not condition():
            await self._moved.wait()

    def round_begun(self, stimulus: ev.RoundBegun) -> None:
        """A round begins: edges that the topology no longer has may go now."""
        self.feed(stimulus)
        self._retiring.clear()
        self._adjust()

    # --- the overlay -------------------------------------------------------------------------

    def set_neighbours(self, neighbours: Mapping[PeerId, Sequence[str]]) -> None:
        """What the topology says; new edges open now, old ones stay until the round is over."""
        for peer, addrs in self._wanted.items():
            if peer not in neighbours and peer in self.swarm.live:
                self._retiring[peer] = addrs
        self._wanted = dict(neighbours)
        self._adjust()

    @property
    def wanted(self) -> Mapping[PeerId, Sequence[str]]:
        """The neighbours that the topology gives us."""
        return self._wanted

    def forget_peer(self, peer: PeerId) -> None:
        """A member is dead or has left: no edge to it is kept."""
        self._retiring.pop(peer, None)
        self._adjust()

    def _adjust(self) -> None:
        """Start and end keepers so that each edge that either side has is kept open."""
        desired: dict[PeerId, Sequence[str]] = {**self._retiring, **self._wanted}
        for peer, edge in self.edges.items():
            if edge.answer is not None and edge.answer.wanted:
                desired.setdefault(peer, ())
        for peer in [peer for peer in self._keepers if peer not in desired]:
            self._keepers.pop(peer).scope.cancel()
        for peer, addrs in desired.items():
            keeper = self._keepers.get(peer)
            if keeper is not None:
                keeper.addrs = addrs or keeper.addrs
            elif self._nursery is not None:
                keeper = self._keepers[peer] = _Keeper(addrs, trio.CancelScope())
                self._nursery.start_soon(self._keep, peer, keeper)

    def _edge(self, peer: PeerId) -> Edge:
        edge = self.edges.get(peer)
        if edge is None:
            if len(self.edges) >= MAX_EDGES:
                self._forget_strangers()
            edge = self.edges[peer] = Edge(peer)
        return edge

    def _forget_strangers(self) -> None:
        """Forget those who were here and are gone, and are no members."""
        for peer, edge in list(self.edges.items()):
            if not (edge.open or peer in self._keepers or peer in self.swarm.live):
                del self.edges[peer]
                self.forgotten.down.include(edge.down)
                self.forgotten.up.include(edge.up)

    async def _keep(self, peer: PeerId, keeper: _Keeper) -> None:
        with keeper.scope:
            retry = FIRST_RETRY
            edge = self._edge(peer)
            if self.swarm.local > peer and edge.answer is None:
                with trio.move_on_after(FIRST_DIAL_HEADSTART):
                    await edge.answered.wait()
            began = trio.current_time()
            while True:
                await trio.sleep(max(0.0, self._banned.get(peer, 0.0) - trio.current_time()))
                was_open = await self._fetch_from(peer, keeper, began)
                if was_open:
                    retry, began = FIRST_RETRY, trio.current_time()
                await trio.sleep(retry * self._rng.uniform(0.75, 1.25))
                retry = min(MAX_RETRY, retry * 2)

    async def _fetch_from(self, peer: PeerId, keeper: _Keeper, began: float) -> bool:
        """Open our stream and use it until it breaks; whether it ever was open."""
        opened = False
        channel: Channel | None = None
        try:
            channel = await self._dialer.open_channel(peer, keeper.addrs)
            with trio.fail_after(HELLO_PATIENCE):
                await channel.send(self._around.hello(wanted=peer in self._wanted))
                answer, _ = await channel.receive()
            self._check_hello(peer, answer)
            opened = True
            await self._asking(peer, channel, trio.current_time() - began)
        except (EdgeClosedError, trio.TooSlowError):
            pass  # the retry follows; membership hears of it below
        except RemoteProtocolError as error:
            self.blame(error.by(peer))
        finally:
            if channel is not None:
                with trio.CancelScope(shield=True):
                    await channel.aclose()
            if not keeper.scope.cancel_called:
                self._around.edge_lost(peer)
        return opened

    def _check_hello(self, peer: PeerId, answer: Message) -> None:
        if isinstance(answer, Refuse):
            self._around.emit(EdgeChanged(peer, "closed", f"refused: {answer.detail[:200]}"))
            raise EdgeClosedError(answer.detail)
        if not isinstance(answer, Hello):
            raise RemoteProtocolError(f"{type(answer).__name__} instead of a Hello", peer)
        refusal = self._around.admit(peer, answer)
        if refusal is not None:
            raise EdgeClosedError(refusal.detail)

    async def _asking(self, peer: PeerId, channel: Channel, seconds: float) -> None:
        """Our stream, from its Hello to its end."""
        edge = self._edge(peer)
        lane = edge.ask = Lane(channel)
        self._around.heard(peer)
        self._around.emit(EdgeChanged(peer, "open", seconds=seconds))
        self.feed(ev.HolderOpened(peer))
        self.feed(ev.Tick())
        pings: dict[int, float] = {}

        async def read() -> None:
            while True:
                message, size = await channel.receive()
                self._note(edge, message, size)
                if isinstance(message, Pong):
                    sent = pings.pop(message.number, None)
                    if sent is not None:
                        edge.measured(trio.current_time() - sent)
                        self.swarm.picker.measured(peer, trio.current_time() - sent)
                else:
                    self.feed(ev.FromHolder(peer, message))

        async def write() -> None:
            await self._write_questions(edge, lane)

        async def ping() -> None:
            await self._ping(edge, lane, pings)

        try:
            await self._run_lane(lane, read, write, ping)
        finally:
            edge.ask = None
            self.feed(ev.HolderClosed(peer))
            self._around.emit(EdgeChanged(peer, "closed"))

    async def _run_lane(self, lane: Lane, *steps: Callable[[], Awaitable[None]]) -> None:
        """Run the tasks of one stream until one of them ends it."""

        async def guarded(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except EdgeClosedError:
                pass  # the caller's finally tells the machine
            except RemoteProtocolError as error:
                self.blame(error.by(lane.channel.remote))
            finally:
                lane.scope.cancel()

        with lane.scope:
            async with trio.open_nursery() as nursery:
                for step in steps:
                    nursery.start_soon(guarded, step)

    async def _write_questions(self, edge: Edge, lane: Lane) -> None:
        while True:
            await lane.outbox.wait()
            while messages := lane.outbox.take_some():
                await self._send(edge, lane, messages)

    async def _send(self, edge: Edge, lane: Lane, messages: Sequence[Message]) -> None:
        sizes = await lane.channel.send_together(messages)
        now = trio.current_time()
        for message, size in zip(messages, sizes, strict=True):
            edge.up.add(message, size, now)

    async def _ping(self, edge: Edge, lane: Lane, pings: dict[int, float]) -> None:
        number = begun = 0
        while True:
            await trio.sleep(PING_INTERVAL)
            now = trio.current_time()
            if lane.channel.begun != begun:  # a large message, slowly
                begun = lane.channel.begun
                self._heard(edge, now)
            # One unanswered ping says as much as many; bytes of any kind are a sign of life too.
            if not pings and (now - edge.heard_at >= PING_INTERVAL or edge.round_trip is None):
                number = (number + 1) & 0xFFFFFFFF
                pings[number] = now
                lane.outbox.put(Ping(number))

    # --- serving -----------------------------------------------------------------------------

    async def serve(self, channel: Channel) -> None:
        """A neighbour opened its stream to us: answer on it until it ends."""
        peer = channel.remote
        try:
            with trio.fail_after(HELLO_PATIENCE):
                hello, _ = await channel.receive()
                if not isinstance(hello, Hello):
                    raise RemoteProtocolError(f"{type(hello).__name__} instead of a Hello", peer)
                refusal = self._refusal(peer, hello)
                if refusal is not None:
                    await channel.send(refusal)
                    return
                await channel.send(self._around.hello(wanted=peer in self._wanted))
            await self._answering(peer, channel, hello)
        except (EdgeClosedError, trio.TooSlowError):
            pass
        except RemoteProtocolError as error:
            self.blame(error.by(peer))
        finally:
            with trio.CancelScope(shield=True):
                await channel.aclose()

    def _refusal(self, peer: PeerId, hello: Hello) -> Refuse | None:
        left = self._banned.get(peer, 0.0) - trio.current_time()
        if left > 0:
            return Refuse(
                REFUSE_BANNED, f"dropped for breaking the protocol; try again in {left:.0f} s"
            )
        return self._around.admit(peer, hello)

    async def _answering(self, peer: PeerId, channel: Channel, hello: Hello) -> None:
        edge = self._edge(peer)
        if edge.answer is not None:  # a restarted neighbour, or one whose old stream is half dead
            edge.answer.scope.cancel()
        lane = edge.answer = Lane(channel, wanted=hello.wanted)
        edge.round = hello.round
        edge.answered.set()
        self._around.heard(peer)
        self.feed(ev.FetcherOpened(peer))
        self._adjust()

        async def read() -> None:
            while True:
                message, size = await channel.receive()
                if edge.answer is not lane:
                    return  # replaced: its questions are void
                self._note(edge, message, size)
                self.feed(ev.FromFetcher(peer, message))
                self._wake_writers()
                # Who asks faster than it takes the answers is read no faster.
                await lane.outbox.room()

        async def write() -> None:
            await self._write_answers(edge, lane)

        try:
            await self._run_lane(lane, read, write)
        finally:
            if edge.answer is lane:
                edge.answer = None
                edge.answered = trio.Event()
                self.feed(ev.FetcherClosed(peer))
                self._adjust()
                self._wake_writers()

    async def _write_answers(self, edge: Edge, lane: Lane) -> None:
        while True:
            await lane.outbox.wait()
            while True:
                messages = lane.outbox.take_some()
                large = self._add_pieces(edge.peer, messages)
                if not messages:
                    break
                self.swarm.serving.writing(edge.peer, True)
                await self._send(edge, lane, messages)
                self.swarm.serving.writing(edge.peer, False)
                if large is not None:
                    self.swarm.serving.uploaded(edge.peer, large.size, trio.current_time())
                    piece = messages[-1]
                    assert isinstance(piece, Piece)
                    assert isinstance(piece.data, memoryview)
                    self._spares.give(piece.data)
                self._wake_writers()

    def _add_pieces(self, peer: PeerId, messages: list[Message]) -> Upload | None:
        """Add the pieces whose turn it is, small ones together; a large one comes last.

        Returns:
            The large one, which holds its place among the uploads until it is sent.
        """
        while len(messages) < MAX_TOGETHER:
            now = trio.current_time()
            upload = self.swarm.next_upload(peer, now)
            if upload is None:
                return None
            messages.append(upload if isinstance(upload, Reject) else self._piece(upload))
            if isinstance(upload, Upload):
                if upload.size > SMALL_PIECE:
                    return upload
                self.swarm.serving.uploaded(peer, upload.size, now)
        return None

    def _piece(self, upload: Upload) -> Piece:
        data = self._spares.take(upload.size)
        self._store.read(upload.update, upload.chunk, upload.offset, data)
        return Piece(upload.number, data)

    def _wake_writers(self) -> None:
        for peer in self.swarm.serving.runnable(trio.current_time()):
            edge = self.edges.get(peer)
            if edge is not None and edge.answer is not None:
                edge.answer.outbox.wake()

    # --- effects -----------------------------------------------------------------------------

    def _note(self, edge: Edge, message: Message, size: int) -> None:
        now = trio.current_time()
        edge.down.add(message, size, now)
        self._heard(edge, now)

    def _heard(self, edge: Edge, now: float) -> None:
        edge.heard_at = now
        self._around.heard(edge.peer)

    def blame(self, error: RemoteProtocolError) -> None:
        """A peer broke some protocol: drop it here too."""
        self._apply(self.swarm.blame(error, None), trio.current_time())

    def _apply(self, effects: list[ev.Effect], now: float) -> None:
        for effect in effects:
            if isinstance(effect, ev.ToHolder):
                self._post(effect.peer, effect.message, asking=True)
            elif isinstance(effect, ev.ToFetcher):
                self._post(effect.peer, effect.message, asking=False)
            elif isinstance(effect, ev.StoreBlocks):
                self._store.write(effect.update, effect.chunk, effect.offset, effect.data)
            elif isinstance(effect, ev.StoreComplete):
                self._store.complete_chunk(effect.update, effect.chunk, effect.source)
            elif isinstance(effect, ev.StoreManifest):
                self._store.put_manifest(effect.manifest)
            elif isinstance(effect, ev.Emit):
                self._around.emit(effect.event)
            elif isinstance(effect, ev.PublishManifest):
                self._around.gossip_manifest(effect.data)
            elif isinstance(effect, ev.PublishAvailability):
                self._around.gossip_availability(effect.data)
            elif isinstance(effect, ev.Drop):
                self._drop(effect.peer, effect.reason, effect.seconds, now)
            else:
                self._outcome = effect
                self._over.set()

    def _post(self, peer: PeerId, message: Message, *, asking: bool) -> None:
        edge = self.edges.get(peer)
        lane = None if edge is None else edge.ask if asking else edge.answer
        if lane is None:
            return  # it closed in this very step; the machine hears of it next
        try:
            lane.outbox.put(message)
        except OutboxFullError:
            lane.scope.cancel()

    def _drop(self, peer: PeerId, reason: str, seconds: float, now: float) -> None:
        self._banned.pop(peer, None)
        self._banned[peer] = now + seconds
        if len(self._banned) > MAX_BANNED:
            del self._banned[next(iter(self._banned))]
        edge = self.edges.get(peer)
        for lane in (edge.ask, edge.answer) if edge is not None else ():
            if lane is not None:
                lane.scope.cancel()
        self._around.dropped(peer, reason)
