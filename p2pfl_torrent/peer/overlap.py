"""Rounds whose exchange goes on while the next one is trained (``federate.overlap``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import trio

from p2pfl_torrent.core.overlap import carry_over
from p2pfl_torrent.core.reports import UNDERWAY, RoundReport, report_without_merging
from p2pfl_torrent.core.tensors import Array, Arrays, ModelSpec
from p2pfl_torrent.peer.rounds import Merged, Rounds


@dataclass(slots=True)
class _Ahead:
    """An exchange that goes on while the user trains.

    Attributes:
        start: the weights that were published, from which the user trains on.
        metrics: what was handed in with them.
        over: its task is through, or has failed.
        merged: how it ended, once it has.
    """

    start: Arrays
    metrics: Mapping[str, float]
    over: trio.Event = field(default_factory=trio.Event)
    merged: Merged | None = None


class Overlap:
    """Stands before ``Rounds`` and answers the user's calls one round late.

    Args:
        spec: of the model, without what an aggregator adds.
        parameters: names of what training moves, the rest of the model being measured.
        total: rounds of the run.
        nursery: where exchanges go on between two calls.
        ended: called as soon as a round has ended here.
        told: called with the report of a round that no call returns.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        spec: ModelSpec,
        parameters: Collection[str],
        total: int,
        nursery: trio.Nursery,
        ended: Callable[[RoundReport], object],
        told: Callable[[RoundReport], object],
    ) -> None:
        self._rounds = rounds
        self._spec = spec
        self._parameters = parameters
        self._total = total
        self._nursery = nursery
        self._ended = ended
        self._told = told
        self._ahead: _Ahead | None = None
        self._training = 0  # the round that is trained while the one before is exchanged

    @property
    def round(self) -> int:
        """The round that the user trains; it changes in calls of ``exchange`` alone."""
        return self._rounds.round if self._ahead is None else self._training

    async def exchange(
        self, arrays: Arrays, num_samples: int, metrics: Mapping[str, float], began: float
    ) -> Merged:
        """Take what came of the round before, and share this one's progress on top of it.

        Args: as ``Rounds.exchange``.

        Returns:
            The weights to train on from (None: those that were handed in) and the report of the
            round before. In the last round, which is waited for, the aggregate and its report. A
            call that was cancelled may be repeated.

        Raises:
            UpdateError: as ``Rounds.exchange``; nothing was shared, and the call may be repeated.
        """
        with self._rounds.called():
            before = await self._outcome()
            if before is not None and self._rounds.round > self._total:
                self._ahead = None  # the others had finished: nobody would take one more update
                return before
            own = await trio.to_thread.run_sync(self._on_top_of, before, arrays)
            solo = await self._rounds.publish(own, num_samples, metrics, began)
            # No checkpoint from here to the end of this call, but for the last round's closing:
            # who was cancelled after publishing has the model of before.
            moved = own if before is not None else None
            if solo is None and self._rounds.round < self._total:
                self._begin(own, metrics)
                report = self._report(began, metrics) if before is None else before.report
                return Merged(moved, report)
            self._ahead = None
            if before is not None:
                self._told(before.report)
            if solo is None:
                solo = await self._rounds.close(metrics)
                moved = solo.arrays
            self._ended(solo.report)
            return Merged(moved, solo.report)

    async def drain(self) -> None:
        """Wait until no exchange goes on in the background, and tell how it ended."""
        if self._ahead is not None:
            await self._ahead.over.wait()
            if self._ahead.merged is not None:
                self._told(self._ahead.merged.report)

    def _begin(self, start: Arrays, metrics: Mapping[str, float]) -> None:
        self._ahead = _Ahead(start, metrics)
        self._training = self._rounds.round + 1
        self._nursery.start_soon(self._close, self._ahead)

    async def _close(self, ahead: _Ahead) -> None:
        try:
            await self._end(ahead)
        except Exception:  # noqa: BLE001 - the user's next call tries again, and raises it
            pass
        finally:
            ahead.over.set()

    async def _end(self, ahead: _Ahead) -> None:
        ahead.merged = await self._rounds.close(ahead.metrics)
        self._ended(ahead.merged.report)

    async def _outcome(self) -> Merged | None:
        """How the round before ended; None where none was under way."""
        ahead = self._ahead
        if ahead is None:
            return None
        await ahead.over.wait()
        if ahead.merged is None:
            await self._end(ahead)
        return ahead.merged

    def _on_top_of(self, before: Merged | None, arrays: Arrays) -> dict[str, Array]:
        """This peer's progress on top of the round before: arrays that nobody else changes."""
        if before is None:
            return {name: np.array(array) for name, array in arrays.items()}
        assert self._ahead is not None
        assert before.arrays is not None  # a round that was under way is no solo round
        return carry_over(self._spec, before.arrays, self._ahead.start, arrays, self._parameters)

    def _report(self, began: float, metrics: Mapping[str, float]) -> RoundReport:
        """Of a call before which no round was under way."""
        round = self._rounds.round
        return report_without_merging(
            round=round,
            next_round=round + 1,
            closed_by=UNDERWAY,
            members=self._rounds.members,
            seconds=trio.current_time() - began,
            model_hash=self._rounds.base_hash.hex(),
            metrics=metrics,
        )
