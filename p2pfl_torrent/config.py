"""A peer's configuration: the seed's YAML sections and keys, validated, each with one home.

Every key does something; an unknown key is an error with a suggestion. ``docs/reference/
configuration.md`` is made from the fields here, by ``reference``.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import msgspec
import yaml

from p2pfl_torrent.core.chunking import Layout, plan
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import RoundTerms, Terms, TopologyTerms
from p2pfl_torrent.core.tensors import ModelSpec
from p2pfl_torrent.core.topology import validate as validate_topology

GENESIS, LOCAL = "genesis", "local"

ImportanceMethod = Literal["change", "l2_norm", "random"]
GRADIENT_METHODS = ("magnitude", "snip", "fisher", "delta", "adaptive")


def key(default: Any, scope: str, meaning: str, why: str) -> Any:
    """A configuration key: default, whether all peers must agree on it, meaning, reason."""
    metadata = {"scope": scope, "meaning": meaning, "why": why}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type[Any]) -> Any:
    """A nested group of keys with defaults of its own."""
    return field(default_factory=kind)


@dataclass(frozen=True, slots=True)
class SwarmSection:
    """Which swarm."""

    name: str = key("swarm", GENESIS, "the swarm's name", "tells swarms on one bootstrap apart")
    seed: int = key(0, GENESIS, "seed of everything all peers draw alike", "same run, same overlay")
    run_id: str = key(
        "", LOCAL, "nonce of this run; empty: the first peer draws one",
        "the same file run twice makes two swarms, so nothing can be replayed",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FederateSection:
    """Rounds and who takes part."""

    client_num: int = key(2, GENESIS, "members that round 1 waits for", "the smallest swarm")
    total_round_num: int = key(10, GENESIS, "rounds of the run", "enough to see learning")
    mode: Literal["distributed", "swarm"] = key(
        "swarm", GENESIS, "everyone gets every update; `distributed` is the seed's name for it",
        "plain FedAvg semantics",
    )  # fmt: skip
    aggregator: Literal["fedavg"] = key("fedavg", GENESIS, "how updates become one model", "FedAvg")
    min_members: int = key(2, GENESIS, "with fewer live members a round is solo", "alone, no merge")
    join_timeout: float = key(
        120.0, GENESIS, "seconds until round 1 starts with at least `min_members`",
        "people start peers by hand",
    )  # fmt: skip
    train_timeout: float = key(
        3600.0, GENESIS, "seconds of training after which the exchange window opens regardless",
        "an hour of training is a long round; set it to what yours takes",
    )  # fmt: skip
    quorum: float = key(
        0.5, GENESIS, "share of live members that must publish to open the window",
        "half: one early or hostile peer moves nothing, the slower half is not waited for twice",
    )  # fmt: skip
    max_staleness: int = key(
        2, GENESIS, "rounds by which an update may be late and still count, discounted",
        "older weights pull the model back",
    )  # fmt: skip
    max_num_samples: int = key(
        10_000_000, GENESIS, "largest num_samples an update may claim", "nobody can shout"
    )
    on_merge: Literal["keep", "reset"] = key(
        "keep", LOCAL, "what becomes of the optimizer's state after merging",
        "momentum kept learns a little faster on most tasks",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TopologySection:
    """Who is whose neighbour."""

    use: bool = key(True, GENESIS, "false: everybody is everybody's neighbour", "sparse scales")
    type: Literal["star", "ring", "mesh", "tree", "full", "custom"] = key(
        "mesh", GENESIS, "shape of the overlay", "survives losses, spreads load"
    )
    connections: int = key(3, GENESIS, "neighbours per peer of a mesh", "two may fail unnoticed")
    arity: int = key(2, GENESIS, "children per node of a tree", "binary")
    custom_graph: dict[int, list[int]] = key(
        {}, GENESIS, "place in `members` -> places of its neighbours, from 1", "the seed's form"
    )
    members: list[str] = key(
        [], GENESIS, "PeerIds the custom graph's places stand for; empty: order of joining",
        "an order all agree on",
    )  # fmt: skip
    timeout: float = key(
        30.0, LOCAL, "seconds to open the first edges before training starts anyway",
        "a neighbour that cannot be reached must not stop the rest",
    )  # fmt: skip
    max_connection_attempts: int = key(
        5, LOCAL, "tries to reach a bootstrap peer before giving up", "it may still be starting"
    )


@dataclass(frozen=True, slots=True)
class BittorrentSection:
    """The exchange of chunks."""

    enable: bool = key(True, LOCAL, "false: every round is solo, nothing is sent", "to compare")
    timeout: float = key(
        600.0, GENESIS, "seconds of the exchange window", "the seed's; rounds close earlier"
    )
    chunk_selection: Literal["rarest_first", "importance", "random"] = key(
        "rarest_first", LOCAL, "what to fetch first",
        "on ample links the rarest first; importance x age where deadlines cut rounds short",
    )  # fmt: skip
    min_completion_ratio: float = key(
        0.8, GENESIS, "below this share of bytes the window is extended once, if that can help",
        "70% of the chunks is a good round",
    )  # fmt: skip
    active_requests: int = key(10, LOCAL, "open requests per neighbour", "the seed's active pool")
    pending_requests: int = key(20, LOCAL, "chunks begun at a time", "the seed's pending pool")
    endgame_holders: int = key(2, LOCAL, "holders asked for an overdue block", "the seed's")
    upload_slots: int = key(4, LOCAL, "peers served at once, one more at random", "BitTorrent's")
    fill_max_age: int = key(
        5, GENESIS, "rounds for which an owner's last received chunk fills a missing one",
        "old values still beat none on starved links",
    )  # fmt: skip
    linger: float = key(
        10.0, LOCAL, "seconds at most to go on serving after the last round", "seeding"
    )


@dataclass(frozen=True, slots=True)
class L2NormSection:
    """Settings of `importance_method: l2_norm`."""

    depth_boost: float = key(0.3, LOCAL, "extra weight of the deepest layer", "the seed's")
    normalize_by_size: bool = key(True, LOCAL, "divide by sqrt(size)", "big chunks do not win")


@dataclass(frozen=True, slots=True)
class ImportanceSection:
    """Settings per importance method."""

    l2_norm: L2NormSection = section(L2NormSection)


@dataclass(frozen=True, slots=True)
class ChunkSection:
    """How the model is cut, and what is exchanged of it."""

    num_chunks: int = key(20, GENESIS, "chunks to aim at", "the seed's; fewer for tiny models")
    block_size: int = key(
        65536, GENESIS, "bytes of a block: requested, hashed and verified at once",
        "4 s of a 128 kbit/s link; hashes are 0.05% of the payload",
    )  # fmt: skip
    importance_method: ImportanceMethod = key(
        "change",
        LOCAL,
        "how a chunk's importance is scored",
        "needs no gradients, did well in trials",
    )
    importance_config: ImportanceSection = section(ImportanceSection)
    include: list[str] = key(["*"], GENESIS, "globs of tensors to exchange", "everything")
    exclude: list[str] = key([], GENESIS, "globs of tensors that stay home", "private heads")
    norm_policy: Literal["average", "local", "recalibrate"] = key(
        "average", GENESIS, "what becomes of normalisation layers", "FedAvg; local is FedBN"
    )


@dataclass(frozen=True, slots=True)
class NetworkSection:
    """Addresses."""

    listen: list[str] = key(
        ["/ip4/127.0.0.1/tcp/0"], LOCAL, "multiaddrs to listen on",
        "nobody outside this machine; use /ip4/0.0.0.0/tcp/4001 to be reached",
    )  # fmt: skip
    bootstrap: list[str] = key(
        [], LOCAL, "multiaddrs of peers to enter through; empty: this peer founds the swarm",
        "any member or `p2pfl-torrent bootstrap` will do; several may be listed",
    )  # fmt: skip
    announce: list[str] = key(
        [], LOCAL, "multiaddrs told to others instead of the listening ones", "behind NAT"
    )


@dataclass(frozen=True, slots=True)
class SecuritySection:
    """Who may take part."""

    allow: list[str] = key([], LOCAL, "PeerIds to exchange with; empty: everybody", "open swarm")


@dataclass(frozen=True, slots=True)
class StorageSection:
    """Where things are kept."""

    state_dir: str = key(
        "", LOCAL, "identity, updates and checkpoints; empty: temporary, gone at the end",
        "give one to resume after a crash",
    )  # fmt: skip
    run_dir: str = key("", LOCAL, "events.jsonl and the other logs; empty: none", "a clean default")
    keep_rounds: int = key(2, LOCAL, "rounds whose updates are kept for others", "stragglers")


@dataclass(frozen=True, slots=True)
class TaskSection:
    """What `p2pfl-torrent join` trains; a program that embeds `Peer` has its own."""

    recipe: str = key("digits", LOCAL, "data set, model and defaults", "ships with scikit-learn")
    partition: str = key(
        "", LOCAL, "iid, dirichlet(ALPHA) or label_skew(N); empty: the recipe's", "non-IID"
    )
    part: int = key(0, LOCAL, "which part of the data is this peer's, from 1; 0: ask --part", "")
    parts: int = key(0, LOCAL, "parts the data is cut into; 0: client_num", "one each")
    epochs: int = key(
        0, LOCAL, "local epochs per round; 0: the recipe's", "the recipe was measured"
    )
    lr: float = key(0.0, LOCAL, "learning rate; 0: the recipe's", "the recipe was measured")
    batch_size: int = key(0, LOCAL, "samples per step; 0: the recipe's", "the recipe was measured")
    data_root: str = key("", LOCAL, "where MNIST's idx files are", "P2PFL_TORRENT_DATA else")


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
        try:
            data = yaml.safe_load(file.read_text())
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise ConfigError(f"{file}: {reason}; give the path of a YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f" near line {where.line + 1}" if where else ""
            raise ConfigError(f"{file}: not valid YAML{line}; check indentation.") from error
        try:
            return cls.from_mapping(data if data is not None else {})
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def from_mapping(cls, data: object) -> PeerConfig:
        """Build from nested dictionaries as YAML gives them; ConfigError names the key."""
        _check_keys(cls, data, "")
        _explain_gradient_method(data)
        try:
            config = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(_readable(str(error))) from error
        return config.validated()

    def with_values(self, **values: object) -> PeerConfig:
        """A copy with other values, keys written ``section__key`` (two underscores)."""
        result = self
        for name, value in values.items():
            group, _, inner = name.partition("__")
            _check_keys(PeerConfig, {group: {inner: value}}, "")
            part = replace(getattr(result, group), **{inner: value})
            result = replace(result, **{group: part})
        return result.validated()

    def to_mapping(self) -> dict[str, Any]:
        """Nested dictionaries; ``from_mapping`` is the reverse."""
        return cast("dict[str, Any]", msgspec.to_builtins(self, str_keys=False))

    def to_yaml(self) -> str:
        """YAML that ``load`` reads."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)

    def validated(self) -> PeerConfig:
        """Itself, if the values fit together; ConfigError names the key otherwise."""
        federate, bittorrent = self.federate, self.bittorrent
        _at_least("federate.client_num", federate.client_num, 1)
        _at_least("federate.total_round_num", federate.total_round_num, 1)
        _at_least("federate.min_members", federate.min_members, 2)
        _at_least("federate.max_staleness", federate.max_staleness, 0)
        _at_least("federate.max_num_samples", federate.max_num_samples, 1)
        _at_least("bittorrent.active_requests", bittorrent.active_requests, 1)
        _at_least("bittorrent.pending_requests", bittorrent.pending_requests, 1)
        _at_least("bittorrent.endgame_holders", bittorrent.endgame_holders, 1)
        _at_least("bittorrent.upload_slots", bittorrent.upload_slots, 1)
        _at_least("bittorrent.fill_max_age", bittorrent.fill_max_age, 0)
        _at_least("bittorrent.linger", bittorrent.linger, 0)
        _at_least("chunk.num_chunks", self.chunk.num_chunks, 1)
        _at_least("storage.keep_rounds", self.storage.keep_rounds, 1)
        _at_least("topology.max_connection_attempts", self.topology.max_connection_attempts, 1)
        for name, value in (
            ("federate.join_timeout", federate.join_timeout),
            ("federate.train_timeout", federate.train_timeout),
            ("bittorrent.timeout", bittorrent.timeout),
            ("topology.timeout", self.topology.timeout),
        ):
            if not 0 < value <= 7 * 86400:
                raise ConfigError(f"{name} is {value:g}: give seconds, above 0 and at most a week.")
        for name, value in (
            ("federate.quorum", federate.quorum),
            ("bittorrent.min_completion_ratio", bittorrent.min_completion_ratio),
        ):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value:g}: it is a share, from 0 to 1.")
        if not 1024 <= self.chunk.block_size <= 262144:
            raise ConfigError("chunk.block_size must be from 1024 to 262144 bytes.")
        if not 0 <= self.swarm.seed <= 1 << 53:
            raise ConfigError("swarm.seed must be from 0 to 2^53.")
        if not 1 <= len(self.swarm.name) <= 128:
            raise ConfigError("swarm.name must have 1 to 128 characters.")
        validate_topology(self.topology_terms(), federate.client_num)
        return self

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
        )

    def plan_layout(self, spec: ModelSpec) -> Layout:
        """Cut a model as ``chunk`` says."""
        return plan(spec, num_chunks=self.chunk.num_chunks, block_size=self.chunk.block_size)

    def terms(self, spec: ModelSpec, layout: Layout) -> Terms:
        """What all peers of the swarm must agree on."""
        federate = self.federate
        return Terms(
            name=self.swarm.name,
            mode="swarm",
            aggregator=federate.aggregator,
            seed=self.swarm.seed,
            model=spec.fingerprint(),
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
            ),
        )

    def new_run_id(self) -> str:
        """The run's nonce: the configured one, or a new one."""
        return self.swarm.run_id or secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class KeyReference:
    """A row of the reference: one key."""

    path: str
    type: str
    default: str
    scope: str
    meaning: str
    why: str


def reference(kind: type[Any] = PeerConfig, prefix: str = "") -> Iterator[KeyReference]:
    """Every key, in order."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from reference(hints[item.name], f"{path}.")
            continue
        yield KeyReference(
            path,
            _type_name(hints[item.name]),
            _default_text(item),
            item.metadata["scope"],
            item.metadata["meaning"],
            item.metadata["why"],
        )


def _default_text(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    else:
        value = item.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _type_name(hint: Any) -> str:
    choices = get_args(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(choices)
    return hint.__name__ if isinstance(hint, type) and not choices else str(hint)


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}: it must be {least} or more.")


def _check_keys(kind: type[Any], data: object, prefix: str) -> None:
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{where} must hold keys with values, as in 'key: value'.")
    hints = get_type_hints(kind)
    for name, value in data.items():
        if name in hints:
            if is_dataclass(hints[name]):
                _check_keys(cast("type[Any]", hints[name]), value, f"{prefix}{name}.")
            continue
        path = f"{prefix}{name}"
        if prefix == "chunk.importance_config." and name in GRADIENT_METHODS:
            raise ConfigError(_gradient_sentence(str(name)))
        known = [row.path for row in reference()]
        same = [key for key in known if key.rpartition(".")[2] == name]
        close = same or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path} is not a key{hint or '; see the configuration reference.'}")


def _explain_gradient_method(data: object) -> None:
    chunk = data.get("chunk") if isinstance(data, Mapping) else None
    method = chunk.get("importance_method") if isinstance(chunk, Mapping) else None
    if method in GRADIENT_METHODS:
        raise ConfigError(_gradient_sentence(str(method)))


def _gradient_sentence(method: str) -> str:
    return (
        f"chunk.importance_method: {method} needs gradient statistics, which this version does not "
        f"gather; use {', '.join(get_args(ImportanceMethod))}."
    )


def _readable(message: str) -> str:
    """msgspec's `Expected `int`, got `str` - at `$.chunk.num_chunks`` as one sentence."""
    what, _, where = message.partition(" - at `$.")
    path = where.rstrip("`")
    return f"{path}: {what[0].lower()}{what[1:]}." if path else f"{what}."
