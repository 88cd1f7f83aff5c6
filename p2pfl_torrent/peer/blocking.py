"""``Peer``: a peer inside an ordinary, blocking training program."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast

import trio
from outcome import Error, Outcome, Value

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import P2PFLError
from p2pfl_torrent.core.reports import PeerStatistics, RoundReport
from p2pfl_torrent.learning.gradients import GradientStats
from p2pfl_torrent.learning.scaffold import Scaffold
from p2pfl_torrent.learning.state import Module, Optimizer
from p2pfl_torrent.peer.feed import DEFAULT_BACKLOG, Subscription
from p2pfl_torrent.peer.model import Evaluate, LocalModel
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.running import open_node

T = TypeVar("T")

SIGNAL_LATENCY = 0.2  # seconds after which Ctrl-C is seen, should another thread have been told
PROGRESS_INTERVAL = 0.1  # seconds between two reports of training progress


class PeerStoppedError(P2PFLError):
    """The peer's network has stopped; the text says why."""


class Peer:
    """A member of a swarm, for a training loop that blocks.

    The network runs in a thread of its own, so chunks are served while the loop trains. ``with``
    joins the swarm and puts the common start weights into ``model``; leaving the block serves the
    neighbours until they have what they need, then says goodbye.

    Args:
        config: this peer's configuration.
        model: any ``torch.nn.Module``; its ``state_dict`` is what is exchanged, as
            ``chunk.include``, ``exclude`` and ``norm_policy`` say.
        evaluate: scores the model before and after each merge, for the report, in the thread that
            calls ``exchange``. An error in it comes out of that call; after the merge the round is
            over all the same.
        optimizer: needed for ``federate.on_merge: reset``.
        calibration: batches for ``chunk.norm_policy: recalibrate``.
        gradients: `GradientStats` of the model and optimizer, for the importance methods
            ``magnitude``, ``snip``, ``fisher``, for ``adaptive`` where it uses one of them, and for
            ``auto`` to choose by the model's architecture.
        controls: `Scaffold` of the model and optimizer, for ``federate.aggregator: scaffold``.
        on_address: told each multiaddr under which this peer can be reached as soon as it listens,
            in the network's thread; ``print`` will do. Joining takes until the others are there,
            and they may need the address to come.

    Raises:
        ConfigError: the configuration and the arguments do not fit.
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
        self._thread = threading.Thread(target=self._run, name="p2pfl-torrent", daemon=True)
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._is_ending = False
        self._calls: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        self._scope = trio.CancelScope()
        self._error: BaseException | None = None
        self._progress_at = 0.0

    # --- the network's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - handed to the user's thread, which raises it
            self._error = error
        finally:
            self._ready.set()
            self._ended.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            if self._is_ending:
                self._scope.cancel()
            async with open_node(self._node):
                async with trio.open_nursery() as self._calls:
                    self._ready.set()
                    await self._stop.wait()
                    self._calls.cancel_scope.cancel()

    async def _in_nursery(
        self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> Outcome[T] | None:
        """A call's outcome; None if the peer ended first.

        A user's call runs in a nursery inside the peer, so that it is over, with all its threads,
        before anything is closed that it uses. (trio would make it a task of the whole run.)
        """
        result: Outcome[T] | None = None
        over = trio.Event()

        async def run() -> None:
            nonlocal result
            try:
                result = Value(await function(*args))
            except Exception as error:  # noqa: BLE001 - raised in the user's thread
                result = Error(error)
            finally:
                over.set()

        if self._calls is None or self._calls.cancel_scope.cancel_called:
            return None
        self._calls.start_soon(run)
        await over.wait()
        return result

    # --- the user's thread -------------------------------------------------------------------

    def _call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run an async function in the network's thread and wait for it."""
        try:
            result = trio.from_thread.run(
                self._in_nursery, function, args, trio_token=self._entered()
            )
        except (trio.RunFinishedError, trio.Cancelled):
            result = None
        if result is None:
            raise self._stopped()
        return cast("T", result.unwrap())

    def _entered(self) -> trio.lowlevel.TrioToken:
        if self._token is None:
            raise PeerStoppedError("This peer does not run yet: use it in a with block.")
        return self._token

    def _stopped(self) -> PeerStoppedError:
        _wait(self._ended)
        why = f": {self._error}" if self._error is not None else ""
        return PeerStoppedError(f"This peer has stopped{why}.")

    def __enter__(self) -> Peer:
        try:
            self._thread.start()
        except BaseException:
            self._is_ending = True  # should it have come to run all the same
            raise
        try:
            _wait(self._ready)
            if self._error is None:
                self._model.load(self._node.start_weights(), self._node.own_controls())
        except BaseException:  # Ctrl-C, for one: the block is not entered, so nobody would leave it
            self._end(self._scope.cancel)
            raise
        if self._error is not None:
            _wait(self._ended)
            raise self._error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # After an error the user wants out now; else the neighbours are served first.
            self._end(self._stop.set if kind is None else self._scope.cancel)
        except BaseException:  # Ctrl-C while they are
            self._end(self._scope.cancel)
            raise
        if kind is None and self._error is not None:
            raise self._stopped() from self._error

    def _end(self, how: Callable[[], object]) -> None:
        """Make the network's thread end, and wait until everything is closed."""
        self._is_ending = True
        if self._token is not None:
            try:
                self._token.run_sync_soon(how)
            except trio.RunFinishedError:
                pass
        # Not join: one that Ctrl-C interrupts takes the thread for ended ever after (Python 3.11).
        _wait(self._ended)

    @property
    def peer_id(self) -> str:
        """This peer's libp2p id."""
        return self._node.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs under which this peer can be reached, for others' ``network.bootstrap``."""
        return self._node.addrs

    def rounds(self) -> Iterator[int]:
        """The rounds to train, until the last; call ``exchange`` once for each.

        Numbers may skip after this peer missed rounds, and repeat after a solo round.
        """
        while self._node.round <= self._node.total_rounds:
            yield self._node.round

    def exchange(self, num_samples: int, metrics: Mapping[str, float] | None = None) -> RoundReport:
        """Share the model's weights and replace them by the swarm's aggregate.

        Blocks until the round is closed: all live members' updates are here, or the deadline has
        passed. Like ``optimizer.step()`` it works in place. With ``federate.overlap`` it blocks
        until the round before is closed, and leaves the model at that round's aggregate with this
        peer's own progress since; its report is of that round. The last round is waited for.

        Args:
            num_samples: training samples behind the update: its weight in the average.
            metrics: anything to be kept with the report, such as the training loss.

        Raises:
            UpdateError: the weights hold NaN or infinity, or ``num_samples`` is out of range.
            ConfigError: importance needs gradients, and ``gradients`` has seen none; nothing was
                shared.
            PeerStoppedError: the network has failed.
        """
        before = self._model.score()
        arrays = self._model.arrays()
        merged = self._call(self._node.exchange, arrays, num_samples, metrics or {})
        finished = partial(self._soon, self._node.finished)
        return self._model.merged(
            merged.arrays, merged.report, merged.own_controls, before, finished
        )

    def _soon(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._entered().run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise self._stopped() from None

    def progress(self, done: int, total: int, loss: float | None = None) -> None:
        """Tell watchers how far this round's training is (batches, epochs: any unit)."""
        # Each call wakes the network's thread, which costs the training loop its turn: ten a second
        # are all that anybody can see.
        now = time.monotonic()
        if done >= total or now - self._progress_at >= PROGRESS_INTERVAL:
            self._progress_at = now
            self._soon(self._node.progress, done, total, loss)

    def statistics(self) -> PeerStatistics:
        """A snapshot of what this peer is doing."""
        try:
            return trio.from_thread.run_sync(self._node.statistics, trio_token=self._entered())
        except (trio.RunFinishedError, trio.Cancelled):
            raise PeerStoppedError("This peer has stopped.") from None

    def snapshot(self) -> PeerStatistics | None:
        """``statistics``, or None while the peer is not up: for recorders in other threads."""
        if self._token is None or not self._ready.is_set() or self._error is not None:
            return None
        try:
            return self.statistics()
        except PeerStoppedError:
            return None

    def events(self, backlog: int = DEFAULT_BACKLOG) -> Subscription:
        """Events from now on, as a blocking iterator for another thread."""
        return self._node.feed.subscribe(backlog)


def _wait(event: threading.Event) -> None:
    """Wait in the user's thread, and notice Ctrl-C.

    Python runs signal handlers in the main thread, and only when that runs: where the kernel told
    another thread of the signal, a wait without an end sleeps through it.
    """
    while not event.wait(SIGNAL_LATENCY):
        pass
