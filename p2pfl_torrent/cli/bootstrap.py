"""``p2pfl-torrent bootstrap``: a meeting place that prints its address and waits for Ctrl-C."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from p2pfl_torrent.cli.output import STDOUT, check_writable, write_json

DEFAULT_LISTEN = ("/ip4/127.0.0.1/tcp/0",)  # nobody outside is let in unasked


def run(arguments: Namespace) -> int:
    """Serve until interrupted."""
    from p2pfl_torrent.peer.bootstrap import run_bootstrap  # libp2p takes a second to load

    check_writable(arguments.json)

    def ready(addrs: tuple[str, ...]) -> None:
        write_json(arguments.json, {"addrs": addrs})  # first: the line says that all is ready
        if arguments.json != STDOUT:
            for address in addrs:
                print(address, flush=True)

    run_bootstrap(
        tuple(arguments.listen or DEFAULT_LISTEN),
        Path(arguments.state) if arguments.state else None,
        ready,
    )
    return 0
