"""The swarm that ``demo``'s arguments describe, as the configuration of its peers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from p2pfl_torrent.cli.arguments import MAX_PEERS
from p2pfl_torrent.cli.task import recipe_of
from p2pfl_torrent.config import PeerConfig, TaskSection
from p2pfl_torrent.core.errors import ConfigError

DEFAULT_PEERS = 6


def demo_config(arguments: Namespace) -> PeerConfig:
    """The configuration all peers share.

    Raises:
        ConfigError: the arguments contradict each other, there is no such recipe, or the graph
            cannot be used.
    """
    topology, graph = _topology(arguments)
    peers = _peers(arguments, graph)
    task: dict[str, Any] = {"download": arguments.download}
    if arguments.recipe:
        task["recipe"] = arguments.recipe
    if arguments.data:
        task["data_root"] = str(Path(arguments.data).expanduser().absolute())
    if arguments.partition:
        task["partition"] = arguments.partition
    if arguments.epochs:
        task["epochs"] = arguments.epochs
    shape: dict[str, Any] = {"type": topology, "custom_graph": graph}
    if arguments.connections:
        shape["connections"] = arguments.connections
    recipe = recipe_of(TaskSection(**task))
    # All processes train at once, on few cores: an epoch over all data may take that long thrice.
    training = 3 * recipe.epochs * recipe.epoch_seconds
    return PeerConfig.from_mapping(
        {
            "swarm": {"name": "demo", "seed": arguments.seed},
            "federate": {
                "client_num": peers,
                "total_round_num": arguments.rounds or recipe.rounds,
                # All processes start at once, and share the machine while they import and train.
                "join_timeout": 60.0 + 5.0 * peers,
                "train_timeout": 60.0 + 5.0 * peers + training,
            },
            "topology": shape,
            "bittorrent": {"timeout": 30.0 + peers + training, "linger": 5.0},
            "task": task,
        }
    )


def bound(arguments: Namespace, config: PeerConfig) -> float:
    """Seconds after which the demo gives up: what its rounds may take at the very most."""
    if arguments.timeout:
        return float(arguments.timeout)
    federate, torrent = config.federate, config.bittorrent
    per_round = federate.train_timeout + 2 * torrent.timeout  # a window may be extended once
    return federate.join_timeout + federate.total_round_num * per_round + torrent.linger


def topology_of(config: PeerConfig) -> str:
    """The overlay in words."""
    topology = config.topology
    if not topology.use:
        return "full"
    return f"mesh of {topology.connections}" if topology.type == "mesh" else topology.type


def read_graph(path: Path) -> dict[int, list[int]]:
    """The neighbours of each peer, from YAML with the seed's ``custom_graph``, bare or nested.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise ConfigError(f"{path} cannot be read: {reason}.") from error
    for key in ("topology", "custom_graph"):
        if isinstance(data, dict) and key in data:
            data = data[key]
    try:
        graph = msgspec.convert(data, dict[int, list[int]])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} must hold lines such as '1: [2, 3]' ({error}).") from error
    return graph


def _topology(arguments: Namespace) -> tuple[str, dict[int, list[int]]]:
    topology = arguments.topology or ("custom" if arguments.graph else "mesh")
    if arguments.graph and topology != "custom":
        raise ConfigError(
            f"--graph makes the topology custom, but --topology says {topology}: leave one of "
            "them out."
        )
    if topology == "custom" and not arguments.graph:
        raise ConfigError(
            "--topology custom needs --graph FILE, such as examples/custom_graph.yaml."
        )
    if arguments.connections and topology != "mesh":
        raise ConfigError(
            f"--connections is for a mesh, but the topology is {topology}: leave it out."
        )
    return topology, read_graph(Path(arguments.graph)) if arguments.graph else {}


def _peers(arguments: Namespace, graph: dict[int, list[int]]) -> int:
    if not arguments.graph:
        return arguments.peers or DEFAULT_PEERS
    peers = max({*graph, *(other for others in graph.values() for other in others)}, default=0)
    if not 2 <= peers <= MAX_PEERS:
        raise ConfigError(
            f"{arguments.graph} has {peers} peers: a demo takes 2 to {MAX_PEERS}, numbered from 1."
        )
    if arguments.peers and arguments.peers != peers:
        raise ConfigError(
            f"--peers says {arguments.peers}, but {arguments.graph} has {peers} peers: leave "
            "--peers out."
        )
    return peers
