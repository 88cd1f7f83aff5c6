"""Runs a node: host and gossip around it, a nursery inside them, one error out of all that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import trio
from exceptiongroup import BaseExceptionGroup

from p2pfl_torrent.overlay.gossip import open_gossip
from p2pfl_torrent.overlay.host import open_host
from p2pfl_torrent.peer.network import Welcomed
from p2pfl_torrent.peer.node import Node
from p2pfl_torrent.peer.recording import recorded


@asynccontextmanager
async def open_node(node: Node) -> AsyncIterator[Node]:
    """Run a node: joined and ready to train inside the block, gone after it."""
    try:
        async with recorded(node.config.storage.run_dir, node.feed, node.snapshot), _run(node):
            yield node
    finally:
        node.feed.end()


@asynccontextmanager
async def _run(node: Node) -> AsyncIterator[None]:
    failure: BaseException | None = None
    reason = "finished"
    try:
        identity = node.open_identity()
        listen: Sequence[str] = node.config.network.listen
        async with open_host(identity, listen) as host, open_gossip(host) as gossip:
            better: Welcomed | None = await node.find(host, gossip)
            while better is not None:
                async with trio.open_nursery() as nursery:
                    try:
                        better = await node.start(nursery, better)
                        if better is None:
                            yield
                            await node.finish()
                    except BaseException as error:  # noqa: BLE001 - raised again below, outside
                        failure, better = error, None  # the nursery that would wrap it in a group
                    finally:
                        nursery.cancel_scope.cancel()
                if better is not None:
                    await node.give_way()
            if failure is not None:
                raise failure
    except BaseExceptionGroup as group:
        sole = _sole(group)
        reason = _reason(sole)
        raise sole from None
    except BaseException as error:
        reason = _reason(error)
        raise
    finally:
        node.close(reason)


def _reason(error: BaseException) -> str:
    """What ``Left`` says."""
    if isinstance(error, (trio.Cancelled, KeyboardInterrupt)):
        return "stopped before the end"
    return str(error) or type(error).__name__


def _sole(error: BaseException) -> BaseException:
    """The one error behind nested groups, cancellations apart; the group where there are more."""
    leaves = list(_leaves(error))
    errors = [leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)]
    if len(errors) > 1:
        return error
    return (errors or leaves)[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
