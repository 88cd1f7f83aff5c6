"""What the command line understands. Nothing heavy is imported here: help must come at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from p2pfl_torrent import __version__
from p2pfl_torrent.learning.recipes import RECIPES

TOPOLOGIES = ("star", "ring", "mesh", "tree", "full", "custom")
MAX_PEERS = 500  # processes; above that a machine needs the simulator


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command; SystemExit after help, or with 2 for a mistake."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="p2pfl-torrent",
        description="Federated learning without a server: peers exchange model updates the way "
        "BitTorrent exchanges files.",
        epilog="example: p2pfl-torrent demo --peers 6 --rounds 8 --topology mesh",
    )
    parser.add_argument("--version", action="version", version=f"p2pfl-torrent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(commands)
    _bootstrap(commands)
    _join(commands)
    return parser


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _json(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--json", metavar="FILE", help=f"write {what} as JSON; - is standard output"
    )


def _data(command: argparse.ArgumentParser, default: str) -> None:
    add = command.add_argument
    add("--recipe", metavar="NAME",
        help=f"data set and training settings: {', '.join(RECIPES)} ({default})")  # fmt: skip
    add("--data", metavar="DIR", help="folder of the recipe's data files; digits needs none")
    add("--download", action="store_true", help="let torchvision fetch data that is not there")


def _demo(commands: Any) -> None:
    command = _command(
        commands, "demo", "let peers learn together on this machine, and show what it was worth",
        "p2pfl-torrent demo --peers 6 --rounds 8 --topology mesh --json demo.json",
    )  # fmt: skip
    add = command.add_argument
    add("--peers", type=_count(2, MAX_PEERS), metavar="N", help="peers, each a process (6)")
    add("--rounds", type=_count(1), metavar="R", help="rounds (the recipe's; 8 for digits)")
    add("--topology", choices=TOPOLOGIES, help="overlay (mesh)")
    add("--graph", metavar="FILE",
        help="YAML with each peer's neighbours, such as examples/custom_graph.yaml; "
        "makes the topology custom, and says how many peers there are")  # fmt: skip
    add("--connections", type=_count(1), metavar="K", help="neighbours per peer of a mesh (3)")
    add("--partition", metavar="SCHEME",
        help="who gets which data: iid, dirichlet(0.5), label_skew(2) (the recipe's)")  # fmt: skip
    _data(command, "digits")
    add("--epochs", type=_count(1), metavar="E", help="local epochs of a round (the recipe's)")
    add("--seed", type=_count(0), default=0, metavar="S", help="of data, weights and overlay (0)")
    add("--timeout", type=_seconds, metavar="SECONDS", help="bound on the whole run")
    add("--run-dir", metavar="DIR", help="keep every peer's logs here")
    add("--keep", action="store_true", help="keep the logs even without --run-dir")
    _json(command, "every round's figures and accuracies")


def _bootstrap(commands: Any) -> None:
    command = _command(
        commands, "bootstrap", "run a meeting place for peers, which is no member of any swarm",
        "p2pfl-torrent bootstrap --listen /ip4/0.0.0.0/tcp/4001 --state bootstrap-state",
    )  # fmt: skip
    command.add_argument(
        "--listen", action="append", metavar="MULTIADDR",
        help="address to listen on, repeatable (/ip4/127.0.0.1/tcp/0)",
    )  # fmt: skip
    command.add_argument(
        "--state", metavar="DIR", help="keeps the identity, so that the address stays the same"
    )
    _json(command, "the addresses, once it listens,")


def _join(commands: Any) -> None:
    command = _command(
        commands, "join", "train the configuration's task as a member of its swarm",
        "p2pfl-torrent join examples/swarm.yaml --part 1/2 "
        "--bootstrap /ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...",
    )  # fmt: skip
    add = command.add_argument
    add("config", metavar="CONFIG", help="YAML file, the same for all peers but for local keys")
    add("--bootstrap", action="append", metavar="MULTIADDR",
        help="peer to enter through, repeatable (the configuration's)")  # fmt: skip
    add("--listen", action="append", metavar="MULTIADDR", help="address to listen on, repeatable")
    add("--part", type=_part, metavar="K/N", help="train on part K of N of the data")
    _data(command, "the configuration's")
    add("--rounds", type=_count(1), metavar="N", help="rounds; all peers must agree")
    add("--state", metavar="DIR", help="identity, chunks and checkpoints; resumes what is there")
    add("--run-dir", metavar="DIR", help="write events and logs here")
    add("--plain", action="store_true", help="print lines instead of redrawing a view")
    _json(command, "the reports of all rounds")


def _count(least: int, most: int = 1 << 31) -> Any:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} must be from {least} to {most}")
        return value

    return count


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value <= 7 * 86400:
        raise argparse.ArgumentTypeError("seconds must be above 0 and at most a week")
    return value


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form K/N, such as 1/3")
    part, parts = int(match[1]), int(match[2])
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"there is no part {part} of {parts}")
    return part, parts
