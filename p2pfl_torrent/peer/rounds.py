"""One peer's rounds: cut and publish the update, wait for the closing, average, keep, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from p2pfl_torrent.core import events as ev
from p2pfl_torrent.core.aggregation import AggregateResult, aggregate
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.chunking import Layout, slice_of
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.contributions import contributions, recycled
from p2pfl_torrent.core.encoding import KeepUnsent, decode_file, encode_file
from p2pfl_torrent.core.errors import CompressionError, P2PFLError
from p2pfl_torrent.core.genesis import Genesis, RoundTerms
from p2pfl_torrent.core.manifest import Manifest, UpdateId, hash_blocks, make_manifest
from p2pfl_torrent.core.peers import PeerId, Sign
from p2pfl_torrent.core.reports import (
    ImportanceSwitched,
    RoundReport,
    RoundStarted,
    report_without_merging,
)
from p2pfl_torrent.core.tensors import Array, Arrays, model_hash
from p2pfl_torrent.core.versions import Source, all_finite
from p2pfl_torrent.exchange.driver import Exchange
from p2pfl_torrent.peer.bases import Bases, Residuals, missing_of
from p2pfl_torrent.peer.catchup import CatchUp, Taken
from p2pfl_torrent.peer.closings import owner_reports
from p2pfl_torrent.peer.controls import OwnControls
from p2pfl_torrent.peer.feed import EventFeed
from p2pfl_torrent.peer.scoring import ImportanceScorer, LastDelivered
from p2pfl_torrent.store import Checkpoints, Store

TAKEN = "late"  # how a round was closed whose aggregate is another peer's
WRITTEN_AT_A_TIME = 1 << 20  # bytes of an update between two turns of the network: under 1 ms
FETCH_SHARE = 0.05  # of the exchange window, for bases that are not here: 30 s by default
KEPT_CHECKPOINTS = 3  # the current start weights, and two more that others may be fetching


def kept_checkpoints(compression: Compression, terms: RoundTerms) -> int:
    """How many a peer keeps: of changes, also what late updates and old fills began from."""
    oldest = terms.max_staleness if compression.needs_base else 0
    if terms.fill == "recycle" or (terms.fill == "last" and compression.needs_base):
        oldest = max(oldest, terms.fill_max_age)
    return max(KEPT_CHECKPOINTS, oldest + 1)


_Encoded = Callable[[int, KeepUnsent | None], list[bytes | memoryview]]
"""Makes one chunk's file in parts, given the chunk's index and a taker of what is left out."""


class UpdateError(P2PFLError):
    """The update handed to ``exchange`` cannot be shared; the model is left as it was."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What an exchange left: the weights of the next round's start, and the report.

    Attributes:
        arrays: read-only views of the mapped checkpoint; None after a solo round: the model stays
            as it is.
        own_controls: this peer's control variates to train the next round with; None for zeros.
    """

    arrays: dict[str, Array] | None
    report: RoundReport
    own_controls: Arrays | None = None


@dataclass(slots=True)
class _Underway:
    """The exchange of one round since its update was published; it outlives a cancelled call.

    Attributes:
        began: trio's time when the user called.
        duplicate, uploaded: the swarm's bytes so far when it began.
        method: by which the update was ranked; empty for one from before a restart.
        outcome: how it ended, once it has, and when that was.
    """

    began: float
    duplicate: int
    uploaded: int
    method: str = ""
    outcome: ev.CloseRound | ev.MissedRound | None = None
    closed: float = 0.0


class Rounds:
    """Carries a model from round to round."""

    def __init__(
        self,
        *,
        local: PeerId,
        sign: Sign,
        genesis: Genesis,
        layout: Layout,
        store: Store,
        checkpoints: Checkpoints,
        exchange: Exchange,
        catch_up: CatchUp,
        scorer: ImportanceScorer,
        feed: EventFeed,
        enabled: bool,
        residuals: Residuals | None,
        controls: OwnControls | None,
    ) -> None:
        self.round = 0
        self.base_hash = bytes.fromhex(genesis.initial_hash)
        self.phase = "joining"
        self._local = local
        self._sign = sign
        self._genesis = genesis
        self._swarm_id = genesis.swarm_id
        self._layout = layout
        self._store = store
        self._aggregator = make_aggregator(genesis.terms.aggregator, genesis.terms.aggregation)
        self._state_spec = self._aggregator.state_spec(layout.spec)
        self._checkpoints = checkpoints
        self._exchange = exchange
        self._catch_up = catch_up
        self._scorer = scorer
        self._feed = feed
        self._enabled = enabled
        patience = FETCH_SHARE * genesis.terms.rounds.exchange_timeout
        self.bases = Bases(store, checkpoints, catch_up, self.base_hash, patience)
        self._residuals = residuals
        self._controls = controls
        fills_by_change = genesis.terms.rounds.fill == "recycle"
        self.keeps_bases = layout.compression.needs_base or fills_by_change
        self._kept_checkpoints = kept_checkpoints(layout.compression, genesis.terms.rounds)
        self._is_called = False
        self._underway: _Underway | None = None

    # --- beginning ---------------------------------------------------------------------------

    async def begin(self, round: int, arrays: Arrays, base_hash: bytes) -> None:
        """Begin a round from weights that are this peer's own alone."""
        await self._keep(round - 1, arrays)
        self._begin(round, base_hash, caught_up=False)

    async def take_over(self, taken: Taken) -> None:
        """Begin a round from the state of another peer.

        The round before is finished by that, so that a restart goes on from here; and what the
        state is known to hold is recorded, so that it is counted no second time then.
        """
        before = taken.round - 1
        await self._keep(before, taken.arrays)
        self._store.finish_round(before, TAKEN, taken.base_hash, b"{}", ())
        self._begin(taken.round, taken.base_hash, caught_up=True)
        self._note_taken()

    async def _keep(self, round: int, arrays: Arrays) -> None:
        """Keep a round's weights, and the last before it: those of the last finished round."""

        def save() -> None:
            self._checkpoints.save(round, arrays)
            self._checkpoints.prune(self._kept_checkpoints)

        await trio.to_thread.run_sync(save)

    def _note_taken(self) -> None:
        """Record what earlier aggregates hold, also those that were made by others."""
        counted = self._exchange.swarm.ledger.counted_before(self.round)
        self._store.note_counted(counted)

    def resume(self, round: int, base_hash: bytes) -> None:
        """Begin a round whose start weights are in the checkpoint of the round before."""
        self._begin(round, base_hash, caught_up=self._store.closed_by(round - 1) == TAKEN)

    def _begin(self, round: int, base_hash: bytes, *, caught_up: bool) -> None:
        """Begin a round, or what comes after all of them.

        After the last round there is none to train: its aggregate is only served to others.
        """
        is_to_train = round <= self._genesis.terms.rounds.total
        self.round, self.base_hash, self._underway = round, base_hash, None
        self.phase = "training" if is_to_train else "seeding"
        forgotten = tuple(self._store.prune(round))
        self._exchange.round_begun(ev.RoundBegun(round, forgotten, caught_up))
        if is_to_train:
            self._feed.emit(RoundStarted(round, base_hash.hex(), self.members))

    @property
    def members(self) -> int:
        """Live members, this peer included."""
        return len(self._exchange.swarm.live)

    # --- one exchange ------------------------------------------------------------------------

    async def exchange(
        self, arrays: Arrays, num_samples: int, metrics: Mapping[str, float], began: float
    ) -> Merged:
        """Share an update and merge what the others shared.

        Args:
            arrays: the trained weights; read before this returns, never changed.
            began: trio's time when the user called.

        Where an earlier call for this round was cancelled after its update was published, this one
        goes on with that exchange: who published two for one round would be left out of it.

        Raises:
            UpdateError: the update cannot be shared, or an exchange is under way.
            ConfigError: importance needs gradients, and none were seen.
        """
        with self.called():
            solo = await self.publish(arrays, num_samples, metrics, began)
            return await self.close(metrics) if solo is None else solo

    @contextmanager
    def called(self) -> Iterator[None]:
        """The time of a user's call, of which there is one at a time; UpdateError otherwise."""
        if self._is_called:
            raise UpdateError(
                f"exchange was called while the exchange of round {self.round} is under way: await "
                "that call first."
            )
        self._is_called = True
        try:
            yield
        finally:
            self._is_called = False

    async def publish(
        self, arrays: Arrays, num_samples: int, metrics: Mapping[str, float], began: float
    ) -> Merged | None:
        """The first half of an exchange: sign the update, store it and tell the others.

        Args: as ``exchange``. Where an exchange is under way, this changes nothing.

        Returns:
            What came of it, if that is known at once: there are too few members.
        """
        if self._underway is None:
            self._underway = await self._publish_update(arrays, num_samples, began)
        self._observe(metrics)
        return await self._solo(arrays, metrics, began) if self._underway is None else None

    async def close(self, metrics: Mapping[str, float]) -> Merged:
        """The second half: wait until the round is over, merge, and begin the next.

        It may be cancelled and called again.
        """
        assert self._underway is not None
        return await self._finish(self._underway, metrics)

    def _observe(self, metrics: Mapping[str, float]) -> None:
        """Show the scorer the training loss; a switch of its method holds from the next."""
        why = self._scorer.observe(self.round, metrics.get("loss"))
        if why is not None:
            self._feed.emit(ImportanceSwitched(self.round + 1, self._scorer.method, why))

    async def _publish_update(
        self, arrays: Arrays, num_samples: int, began: float
    ) -> _Underway | None:
        """Begin the exchange; None where there are too few members for one."""
        bound = self._genesis.terms.rounds.max_num_samples
        if not 1 <= num_samples <= bound:
            raise UpdateError(
                f"num_samples is {num_samples}: it must be 1 to {bound} (federate.max_num_samples)."
            )
        await trio.to_thread.run_sync(_check_finite, self._layout, arrays)
        swarm = self._exchange.swarm
        if swarm.solo:
            return None
        underway = _Underway(began, swarm.fetching.bytes_duplicate, swarm.serving.bytes_uploaded)
        manifest = self._own_manifest()
        if manifest is None:
            underway.method = self._scorer.method
            manifest = await self._publish(arrays, num_samples)
        self.phase = "exchanging"
        self._exchange.feed(ev.UpdateReady(manifest))
        return underway

    async def _finish(self, underway: _Underway, metrics: Mapping[str, float]) -> Merged:
        if underway.outcome is None:
            underway.outcome = await self._exchange.outcome()
            underway.closed = trio.current_time()
            self.phase = "aggregating"
        if isinstance(underway.outcome, ev.MissedRound):
            merged = await self._missed(underway, metrics)
            if merged is not None:
                return merged
            # Nobody has gone on: the others may be gone. What is here is still worth averaging.
            self._exchange.feed(ev.CloseLate())
            with trio.CancelScope(shield=True):  # it is there already, and is there but once
                underway.outcome = await self._exchange.outcome()
            assert isinstance(underway.outcome, ev.CloseRound)
        return await self._merge(underway.outcome, underway, metrics)

    def _own_manifest(self) -> Manifest | None:
        """Our update of this round from before a restart: a second one would be equivocation."""
        known = self._exchange.swarm.ledger.update_of(self._local, self.round)
        return known.manifest if known is not None and known.held.complete else None

    async def _publish(self, arrays: Arrays, num_samples: int) -> Manifest:
        """Sign the update's manifest and store its chunks.

        Plain chunks come from the arrays themselves. Compressed ones are encoded twice, for the
        hashes and for the store: the manifest must be stored first, and the update's second form
        is never in memory as a whole.
        """
        layout, round = self._layout, self.round
        base = self._checkpoints.load(round - 1) if layout.compression.needs_base else None
        unsent = self._residuals.before(round) if self._residuals is not None else None

        def encoded(index: int, keep: KeepUnsent | None) -> list[bytes | memoryview]:
            return list(encode_file(layout, index, arrays, base, unsent, keep))

        last, start = await self._last_delivered(), partial(self._checkpoints.load, round - 1)
        ranks = await trio.to_thread.run_sync(self._scorer.ranks, round, arrays, last, start)
        try:
            sizes, hashes = await trio.to_thread.run_sync(self._described, encoded)
        except CompressionError as error:
            raise UpdateError(f"{error} This update was not shared.") from error
        manifest = make_manifest(
            layout=layout,
            swarm=self._swarm_id,
            round=round,
            owner=self._local,
            base_hash=self.base_hash,
            num_samples=num_samples,
            sizes=sizes,
            ranks=ranks,
            blocks=hashes,
            sign=self._sign,
        )
        if self._controls is not None:
            await trio.to_thread.run_sync(self._controls.keep, round, arrays)
        await self._store_chunks(manifest, encoded)
        return manifest

    def _described(self, encoded: _Encoded) -> tuple[list[int], list[bytes]]:
        """Sizes and block hashes of the update's chunk files; what a codec leaves out is kept."""
        with ExitStack() as stack:
            keep = None
            if self._residuals is not None:
                keep = stack.enter_context(self._residuals.draft(self.round))
            sizes, hashes = [], []
            for index in range(len(self._layout.chunks)):
                parts = encoded(index, keep)
                sizes.append(sum(map(len, parts)))
                hashes.append(hash_blocks(parts, self._layout.block_size))
        return sizes, hashes

    async def _store_chunks(self, manifest: Manifest, encoded: _Encoded) -> None:
        """Store an update of our own, manifest first; nothing of it stays if that fails."""
        self._store.put_manifest(manifest)
        try:
            for index in range(len(self._layout.chunks)):
                offset = 0
                for part in await trio.to_thread.run_sync(encoded, index, None):
                    for begin in range(0, len(part), WRITTEN_AT_A_TIME):
                        piece = part[begin : begin + WRITTEN_AT_A_TIME]
                        self._store.write(manifest.update, index, offset + begin, piece)
                        await trio.lowlevel.checkpoint()
                    offset += len(part)
                self._store.complete_chunk(manifest.update, index, self._local)
        except BaseException:
            self._store.forget([manifest.update])  # nobody knows of it, and there may be another
            raise

    async def _last_delivered(self) -> LastDelivered:
        """Our update of the round before, or the round's start weights where there is none."""
        layout = self._layout
        known = self._exchange.swarm.ledger.update_of(self._local, self.round - 1)
        if known is not None and known.held.complete:
            update, needed = known.manifest.update, layout.compression.needs_base
            base = (await self.bases.of([known.manifest]))[update] if needed else None
            if base is not None or not needed:
                return lambda chunk: decode_file(
                    layout, chunk, self._store.chunk(update, chunk), base
                )
        start = self._checkpoints.load(self.round - 1)
        tensors = layout.spec.tensors
        return lambda chunk: [
            slice_of(start[tensors[part.tensor].name], part) for part in layout.chunks[chunk].slices
        ]

    async def _merge(
        self,
        close: ev.CloseRound,
        underway: _Underway,
        metrics: Mapping[str, float],
    ) -> Merged:
        chunks = contributions(self._layout, close, self._genesis.terms)
        changes = recycled(close, self._genesis.terms)
        manifests = self._with_bases(chunks, changes)
        bases = await self.bases.fetch(manifests, await self.bases.of(manifests))
        baseless = missing_of(bases)
        chunks = {
            chunk: [source for source in sources if source[1] not in baseless]
            for chunk, sources in chunks.items()
        }
        start = self._checkpoints.load(self.round - 1)
        result, new_hash = await trio.to_thread.run_sync(
            self._average, chunks, start, bases, changes
        )
        swarm = self._exchange.swarm
        received = sum(
            swarm.fetching.bytes_received.get(count.manifest.update, 0) for count in close.counts
        )
        report = RoundReport(
            round=self.round,
            next_round=self.round + 1,
            closed_by=close.closed_by,
            members=close.members,
            owners=owner_reports(
                close, self._layout, {refused.owner for refused in result.refused}, baseless
            ),
            completeness=close.completeness,
            bytes_payload=received,
            bytes_duplicate=swarm.fetching.bytes_duplicate - underway.duplicate,
            bytes_uploaded=swarm.serving.bytes_uploaded - underway.uploaded,
            seconds=trio.current_time() - underway.began,
            exchange_seconds=underway.closed - underway.began,
            aggregate_seconds=trio.current_time() - underway.closed,
            model_hash=new_hash.hex(),
            agreement=self._agreement(),
            extended=close.extended,
            below_min_completion=close.below_min_completion,
            viable=close.viable,
            importance_method=underway.method,
            metrics=dict(metrics),
        )
        self._note_taken()
        self._store.finish_round(
            self.round,
            close.closed_by,
            new_hash,
            msgspec.json.encode(report),
            [count.manifest.update for count in close.counts],
        )
        self.resume(self.round + 1, new_hash)
        weights = self.weights(self._checkpoints.load(self.round - 1))
        return Merged(weights, report, self.own_controls())

    def _with_bases(
        self, chunks: Mapping[int, Sequence[Source]], changes: Set[UpdateId]
    ) -> list[Manifest]:
        """The manifests of what can be merged only with its base."""
        ledger = self._exchange.swarm.ledger
        updates = {update for sources in chunks.values() for _, update, _ in sources}
        if not self._layout.compression.needs_base:
            updates &= changes
        return [ledger[update].manifest for update in updates if update is not None]

    def _average(
        self,
        chunks: Mapping[int, Sequence[Source]],
        start: Arrays,
        bases: Mapping[UpdateId, Arrays | None],
        changes: Set[UpdateId],
    ) -> tuple[AggregateResult, bytes]:
        """Average into this round's checkpoint, in a worker thread; also the aggregate's hash."""
        with self._checkpoints.draft(self.round) as draft:
            result = aggregate(
                self._layout,
                chunks,
                self._store.chunk,
                start,
                draft.put,
                bases.get,
                self._aggregator,
                changes,
            )
            new_hash = draft.model_hash()
        self._checkpoints.prune(self._kept_checkpoints)
        return result, new_hash

    def weights(self, state: Arrays) -> dict[str, Array]:
        """The part of what a round starts from that peers exchange."""
        return {tensor.name: state[tensor.name] for tensor in self._layout.spec.tensors}

    def own_controls(self) -> Arrays | None:
        """This peer's control variates to train the current round with; None for zeros."""
        return None if self._controls is None else self._controls.before(self.round)

    async def _missed(self, underway: _Underway, metrics: Mapping[str, float]) -> Merged | None:
        """The round went on without us: take over the state that the others go on from."""
        patience = self._genesis.terms.rounds.exchange_timeout
        missed = self.round
        taken = await self._catch_up.take(self._others, missed + 1, patience)
        if taken is None:
            return None
        await self.take_over(taken)
        report = report_without_merging(
            round=missed,
            next_round=taken.round,
            closed_by=TAKEN,
            members=self.members,
            seconds=trio.current_time() - underway.began,
            exchange_seconds=underway.closed - underway.began,
            aggregate_seconds=trio.current_time() - underway.closed,
            model_hash=taken.base_hash.hex(),
            late=True,
            attested=taken.attested,
            metrics=metrics,
        )
        return Merged(self.weights(taken.arrays), report, self.own_controls())

    def _others(self) -> list[PeerId]:
        return sorted(peer for peer in self._exchange.swarm.live if peer != self._local)

    async def _solo(self, arrays: Arrays, metrics: Mapping[str, float], began: float) -> Merged:
        """Too few members: nothing is merged, and the round number stays.

        Where there is no exchange at all (``bittorrent.enable: false``) the round is done.
        """
        round, base_hash = self.round, self.base_hash
        if not self._enabled:
            state = {**self._checkpoints.load(round - 1), **arrays}  # the moments stay
            base_hash = await trio.to_thread.run_sync(model_hash, self._state_spec, state)
            if self._controls is not None:
                await trio.to_thread.run_sync(self._controls.keep, round, arrays)
            await self.begin(round + 1, state, base_hash)
        report = report_without_merging(
            round=round,
            next_round=self.round,
            closed_by="solo",
            members=self.members,
            seconds=trio.current_time() - began,
            model_hash=base_hash.hex(),
            metrics=metrics,
        )
        return Merged(None, report)

    def _agreement(self) -> float | None:
        """Share of the others' updates of this round that were trained from our start weights.

        None where there are none, or where every peer has a model of its own.
        """
        if self._genesis.terms.mode != "swarm":
            return None
        bases = [
            known.manifest.header.base_hash
            for known in self._exchange.swarm.ledger
            if known.manifest.round == self.round and known.manifest.owner != self._local
        ]
        return bases.count(self.base_hash) / len(bases) if bases else None


def _check_finite(layout: Layout, arrays: Arrays) -> None:
    """Refuse to share what every other peer would refuse to average."""
    for tensor in layout.spec.tensors:
        if not tensor.is_float:
            continue
        if not all_finite(tensor.dtype, arrays[tensor.name]):
            raise UpdateError(
                f"Tensor {tensor.name!r} holds NaN or infinity: training has diverged, so this "
                "update was not shared; lower the learning rate or restore an earlier checkpoint."
            )
