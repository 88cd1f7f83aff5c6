"""``AsyncPeer``: a peer inside a trio program."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any

import trio

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.reports import PeerStatistics, RoundReport
from p2pfl_torrent.learning.gradients import GradientStats
from p2pfl_torrent.learning.scaffold import Scaffold
from p2pfl_torrent.learning.state import Module, Optimizer
from p2pfl_torrent.peer.feed import DEFAULT_BACKLOG, Subscription
from p2pfl_torrent.peer.model import Evaluate, LocalModel
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node


class AsyncPeer:
    """A member of a swarm, in trio code.

    ``async with`` joins the swarm and puts the common start weights into ``model``; leaving the
    block serves the neighbours until they have what they need, then says goodbye. Train in a
    thread (``trio.to_thread.run_sync``), so that chunks are served meanwhile.

    Ctrl-C: run the program by ``trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)``.
    KeyboardInterrupt then comes to the main task where that waits, and leaves the block as any
    other error does: the peer stops at once and releases its state directory. A thread that trains
    is waited for, unless it was started with ``abandon_on_cancel=True``. Without that argument,
    trio raises it in whatever code runs just then, perhaps libp2p's: nothing can be promised.

    Args: as ``Peer``; ``on_address`` is called in trio's own thread, ``evaluate`` in a worker
        thread, where torch's settings of the calling thread (autocast, current device) do not hold;
        once the aggregate has come it is waited for even by who cancels ``exchange``. ``gradients``
        given samples runs the model in a worker thread too, in evaluation mode, during
        ``exchange`` alone, which waits for it even where it is cancelled.

    Raises (on entering):
        ConfigError, GenesisMismatchError, JoinError and the other P2PFLErrors, one sentence each.
    """

    def __init__(
        self,
        config: PeerConfig,
        model: Module,
        *,
        evaluate: Evaluate | None = None,
        optimizer: Optimizer | None = None,
        calibration: Iterable[Any] | None = None,
        gradients: GradientStats | None = None,
        controls: Scaffold | None = None,
        on_address: Callable[[str], object] | None = None,
    ) -> None:
        self._model = LocalModel(
            config,
            model,
            evaluate=evaluate,
            optimizer=optimizer,
            calibration=calibration,
            controls=controls,
        )
        self._node = Node(
            config,
            self._model.spec,
            self._model.copy(),
            on_address,
            gradients,
            self._model.architecture,
            self._model.parameters,
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> AsyncPeer:
        await self._stack.__aenter__()
        try:
            await self._stack.enter_async_context(open_node(self._node))
            await trio.to_thread.run_sync(
                self._model.load, self._node.start_weights(), self._node.own_controls()
            )
        except BaseException as error:
            # The block is never entered, so nobody else would close what is open.
            with trio.CancelScope(shield=True):
                await self._stack.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @property
    def peer_id(self) -> str:
        """This peer's libp2p id."""
        return self._node.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs under which this peer can be reached, for others' ``network.bootstrap``."""
        return self._node.addrs

    async def rounds(self) -> AsyncGenerator[int, None]:
        """The rounds to train, until the last; call ``exchange`` once for each."""
        while self._node.round <= self._node.total_rounds:
            yield self._node.round

    async def exchange(
        self, num_samples: int, metrics: Mapping[str, float] | None = None
    ) -> RoundReport:
        """Share the model's weights and replace them by the swarm's aggregate. As ``Peer``.

        A call that was cancelled may be repeated: it goes on with the exchange of the same round,
        with the update that was published.
        """
        before = await trio.to_thread.run_sync(self._model.score)
        arrays = await trio.to_thread.run_sync(self._model.arrays)
        merged = await self._node.exchange(arrays, num_samples, metrics or {})
        finished = partial(trio.from_thread.run_sync, self._node.finished)
        with trio.CancelScope(shield=True):  # the next round has begun: the model must begin it too
            return await trio.to_thread.run_sync(
                self._model.merged,
                merged.arrays,
                merged.report,
                merged.own_controls,
                before,
                finished,
            )

    def progress(self, done: int, total: int, loss: float | None = None) -> None:
        """Tell watchers how far this round's training is (batches, epochs: any unit)."""
        self._node.progress(done, total, loss)

    def statistics(self) -> PeerStatistics:
        """A snapshot of what this peer is doing."""
        return self._node.statistics()

    def events(self, backlog: int = DEFAULT_BACKLOG) -> Subscription:
        """Events from now on; ``drain()`` never blocks, iterating does (use a thread)."""
        return self._node.feed.subscribe(backlog)
