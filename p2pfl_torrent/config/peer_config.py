"""``PeerConfig``: everything one peer needs to know, checked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml

from p2pfl_torrent.config.differences import model_term
from p2pfl_torrent.config.reading import known_keys, read_yaml, readable
from p2pfl_torrent.config.schema import (
    BittorrentSection,
    ChunkSection,
    FederateSection,
    NetworkSection,
    SecuritySection,
    StorageSection,
    SwarmSection,
    TaskSection,
    TopologySection,
    section,
    walk,
)
from p2pfl_torrent.core.aggregators import AggregationTerms, Aggregator, make_aggregator
from p2pfl_torrent.core.architecture import Architecture, plan_by_architecture
from p2pfl_torrent.core.chunking import MIN_CHUNK_BYTES, Layout, plan
from p2pfl_torrent.core.compression import Compression
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.tensors import ModelSpec
from p2pfl_torrent.core.topology import validate as validate_topology

_PEER_ID = "[1-9A-HJ-NP-Za-km-z]{40,64}"  # base58; what it decodes to is checked where it is used
_PART = r"/[A-Za-z0-9._:%~-]+"
_ADDRESS = re.compile(rf"({_PART}){{2,}}")
_ADDRESS_OF_PEER = re.compile(rf"({_PART}){{2,}}/p2p/{_PEER_ID}")


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """The whole configuration; build it in code, or load it from YAML."""

    swarm: SwarmSection = section(SwarmSection)
    federate: FederateSection = section(FederateSection)
    topology: TopologySection = section(TopologySection)
    bittorrent: BittorrentSection = section(BittorrentSection)
    chunk: ChunkSection = section(ChunkSection)
    network: NetworkSection = section(NetworkSection)
    security: SecuritySection = section(SecuritySection)
    storage: StorageSection = section(StorageSection)
    task: TaskSection = section(TaskSection)

    @classmethod
    def load(cls, path: str | Path) -> PeerConfig:
        """Read a YAML file; ConfigError names the file and the key."""
        file = Path(path)
        data = read_yaml(file)
        try:
            return cls.from_mapping(data)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def from_mapping(cls, data: object) -> PeerConfig:
        """Build from nested dictionaries as YAML gives them; ConfigError names the key."""
        plain = known_keys(cls, data)
        try:
            config = msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(readable(cls, str(error), plain)) from error
        return config.validated()

    def with_values(self, **values: object) -> PeerConfig:
        """A copy with other values, keys written ``section__key`` (two underscores).

        Raises:
            ConfigError: as ``from_mapping``.
        """
        data = self.to_mapping()
        for name, value in values.items():
            *groups, inner = name.split("__")
            place = data
            for group in groups:
                found = place.setdefault(group, {})
                if not isinstance(found, dict):
                    raise ConfigError(f"{name.replace('__', '.')} is not a key.")
                place = found
            place[inner] = value
        return self.from_mapping(data)

    def to_mapping(self) -> dict[str, Any]:
        """Nested dictionaries; ``from_mapping`` is the reverse."""
        return cast("dict[str, Any]", msgspec.to_builtins(self, str_keys=False))

    def to_yaml(self) -> str:
        """YAML that ``load`` reads."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)

    def validated(self) -> PeerConfig:
        """Itself, if every value is in its bounds and they fit together; else ConfigError."""
        for path, item, _ in walk(PeerConfig):
            value = attrgetter(path)(self)
            bounds = item.metadata["bounds"]
            if isinstance(value, (str, list, dict)):
                if not bounds.hold(len(value)):
                    unit = "characters" if isinstance(value, str) else "entries"
                    raise ConfigError(f"{path} has {len(value)} {unit}: it may have {bounds}.")
            elif not bounds.hold(value):
                raise ConfigError(f"{path} is {value}: it must be {bounds}.")
        self._check_addresses()
        federate = self.federate
        if federate.min_members > max(2, federate.client_num):
            raise ConfigError(
                f"federate.min_members is {federate.min_members}, above federate.client_num "
                f"({federate.client_num}): the first rounds would merge nothing."
            )
        self._check_topology()
        aggregator = make_aggregator(federate.aggregator, self._aggregation())
        self._check_mode(aggregator)
        if federate.client_num < aggregator.least:
            raise ConfigError(
                f"federate.aggregator is {federate.aggregator}, which needs federate.client_num of "
                f"at least {aggregator.least}, not {federate.client_num}: of fewer updates nobody "
                "can say which one lies. Raise that, or use fedavg."
            )
        if federate.overlap and aggregator.has_controls:
            raise ConfigError(
                f"federate.overlap is on, but {federate.aggregator} corrects gradients from the "
                "weights that a round starts from, which then come too late: turn it off, or "
                "choose another federate.aggregator."
            )
        if federate.importance_weighting and not aggregator.is_weighted:
            raise ConfigError(
                f"federate.importance_weighting is on, but {federate.aggregator} has no weights: "
                "turn it off, or choose another federate.aggregator."
            )
        needed = 2 * federate.byzantine + 3
        if federate.aggregator in ("krum", "multi_krum") and federate.client_num < needed:
            raise ConfigError(
                f"federate.byzantine is {federate.byzantine}: for that {federate.aggregator} needs "
                f"federate.client_num of at least {needed}, not {federate.client_num}; raise that, "
                "or lower federate.byzantine."
            )
        return self

    def _check_mode(self, aggregator: Aggregator) -> None:
        """What needs one model everywhere does not go with modes in which each has its own."""
        mode = self.federate.mode
        if mode in ("neighbour", "fragment"):
            needs = {
                f"federate.aggregator: {aggregator.name}": (
                    aggregator.optimizer is not None or aggregator.has_controls
                ),
                "chunk.delta": self.chunk.delta,
                "chunk.compression: topk": self.chunk.compression == "topk",
                "bittorrent.fill: recycle": self.bittorrent.fill == "recycle",
            }
            for what, is_on in needs.items():
                if is_on:
                    raise ConfigError(
                        f"{what} needs a round's start that is the same at every peer, and with "
                        f"federate.mode: {mode} each has its own: choose another, or mode: swarm."
                    )
        if mode == "neighbour" and self.federate.importance_weighting:
            raise ConfigError(
                "federate.importance_weighting is on, but federate.mode: neighbour has weights of "
                "its own: turn it off, or choose another mode."
            )

    def _check_addresses(self) -> None:
        network, peer_id = self.network, re.compile(_PEER_ID)
        _check_form("network.listen", network.listen, _ADDRESS, "/ip4/0.0.0.0/tcp/4001")
        _check_form("network.announce", network.announce, _ADDRESS, "/ip4/192.0.2.1/tcp/4001")
        _check_form("network.bootstrap", network.bootstrap, _ADDRESS_OF_PEER,
                    "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..., as that peer printed it")  # fmt: skip
        _check_form("security.allow", self.security.allow, peer_id, "12D3KooW...")
        _check_form("topology.members", self.topology.members, peer_id, "12D3KooW...")

    def _check_topology(self) -> None:
        topology = self.topology
        if (
            topology.use
            and topology.type != "custom"
            and (topology.custom_graph or topology.members)
        ):
            unread = "custom_graph" if topology.custom_graph else "members"
            raise ConfigError(
                f"topology.{unread} is given, but topology.type is {topology.type}: make the type "
                "custom, or remove it."
            )
        validate_topology(self.topology_terms(), self.federate.client_num)

    # --- what the rooms need -----------------------------------------------------------------

    def topology_terms(self) -> TopologyTerms:
        """The overlay's part of the genesis."""
        topology = self.topology
        return TopologyTerms(
            type=topology.type if topology.use else "full",
            connections=topology.connections,
            arity=topology.arity,
            custom_graph=tuple(
                (place, tuple(sorted(others)))
                for place, others in sorted(topology.custom_graph.items())
            ),
            members=tuple(topology.members),
            redraw=topology.redraw,
        )

    def plan_layout(self, spec: ModelSpec, architecture: Architecture | None = None) -> Layout:
        """Cut a model as ``chunk`` says, a tiny one into fewer chunks, compressed as it says.

        Args:
            architecture: what the model is made of; without it, the cut is uniform.
        """
        spec = make_aggregator(self.federate.aggregator).update_spec(spec)
        num_chunks = max(1, min(self.chunk.num_chunks, spec.nbytes // MIN_CHUNK_BYTES))
        block_size, chosen = self.chunk.block_size, self.chunk.architecture
        if architecture is None or chosen == "uniform":
            plain = plan(spec, num_chunks=num_chunks, block_size=block_size)
        else:
            if chosen != "auto":
                architecture = replace(architecture, family=chosen)
            plain = plan_by_architecture(
                spec, architecture, num_chunks=num_chunks, block_size=block_size
            )
        layout = replace(plain, compression=self._compression())
        for chunk in layout.chunks:
            layout.file_bounds(chunk.index)  # a name that is taken is told before anything starts
        return layout

    def _compression(self) -> Compression:
        chunk = self.chunk
        if chunk.zstd_level and find_spec("zstandard") is None:
            raise ConfigError(
                f"chunk.zstd_level is {chunk.zstd_level}, for which a package is missing: install "
                "p2pfl-torrent[zstd], or make it 0 at every peer."
            )
        return Compression(chunk.compression, chunk.delta, chunk.topk_share, chunk.zstd_level)

    def terms(self, spec: ModelSpec, layout: Layout) -> Terms:
        """What all peers of the swarm must agree on."""
        federate = self.federate
        return Terms(
            name=self.swarm.name,
            mode="swarm" if federate.mode == "distributed" else federate.mode,
            aggregator=federate.aggregator,
            seed=self.swarm.seed,
            model=model_term(spec),
            layout=layout.digest,
            topology=self.topology_terms(),
            rounds=RoundTerms(
                total=federate.total_round_num,
                client_num=federate.client_num,
                min_members=federate.min_members,
                join_timeout=federate.join_timeout,
                train_timeout=federate.train_timeout,
                exchange_timeout=self.bittorrent.timeout,
                quorum=federate.quorum,
                min_completion_ratio=self.bittorrent.min_completion_ratio,
                max_staleness=federate.max_staleness,
                fill_max_age=self.bittorrent.fill_max_age,
                max_num_samples=federate.max_num_samples,
                fill=self.bittorrent.fill,
                fill_decay=self.bittorrent.fill_decay,
                critical_share=self.bittorrent.critical_share,
            ),
            compression=layout.compression.name,
            fragment_share=federate.fragment_share if federate.mode == "fragment" else 1.0,
            aggregation=self._aggregation(),
            architecture=self.chunk.architecture,
            overlap=federate.overlap,
        )

    def _aggregation(self) -> AggregationTerms:
        federate = self.federate
        return AggregationTerms(
            importance_weighting=federate.importance_weighting,
            trim_share=federate.trim_share,
            byzantine=federate.byzantine,
            server_lr=federate.server_lr,
            server_beta1=federate.server_beta1,
            server_beta2=federate.server_beta2,
            server_tau=federate.server_tau,
        )

    def new_run_id(self) -> str:
        """The run's nonce: the configured one, or a new one."""
        return self.swarm.run_id or secrets.token_hex(16)


def _check_form(name: str, values: Iterable[str], form: re.Pattern[str], example: str) -> None:
    for value in values:
        if not form.fullmatch(value):
            raise ConfigError(f"{name}: {value!r} is not of the form {example}.")
