"""The sections and keys of a configuration: each key's default, bounds, meaning and reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, cast, get_type_hints

from p2pfl_torrent.core.compression import MAX_ZSTD_LEVEL, Codec
from p2pfl_torrent.core.genesis import CRITICAL_SHARE

GENESIS, LOCAL = "genesis", "local"

PlainMethod = Literal["change", "delta", "l2_norm", "magnitude", "snip", "fisher", "random"]
ChosenMethod = Literal[
    "change", "delta", "l2_norm", "magnitude", "snip", "fisher", "random", "adaptive"
]
ImportanceMethod = Literal[
    "auto", "change", "delta", "l2_norm", "magnitude", "snip", "fisher", "random", "adaptive"
]
GRADIENT_METHODS = ("magnitude", "snip", "fisher")

WEEK = 7 * 86400  # seconds; the genesis allows no longer wait
MAX_COUNT = 1 << 31  # the genesis' bound on every count
MAX_CHUNKS = 1 << 16  # a chunk's index has 16 bits on the wire


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number, a text's length or a list's length must keep to; None where there is none."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a value keeps to them; NaN does not."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.above is not None:
            low = f"above {self.above:,}"
            return low if self.most is None else f"{low}, at most {self.most:,}"
        if self.least is not None:
            return (
                f"{self.least:,} or more"
                if self.most is None
                else (f"from {self.least:,} to {self.most:,}")
            )
        return "" if self.most is None else f"at most {self.most:,}"


def key(
    default: Any,
    scope: str,
    meaning: str,
    why: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A configuration key: default, whether all peers must agree on it, meaning, reason, bounds.

    Bounds are on a number's value, and on the length of a text or a list.
    """
    bounds = Bounds(least, above, most)
    metadata = {"scope": scope, "meaning": meaning, "why": why, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type[Any]) -> Any:
    """A nested group of keys with defaults of its own."""
    return field(default_factory=kind)


def walk(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """(dotted key, field, type) of every key below a section, in order."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from walk(cast("type[Any]", hint), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, hint


@dataclass(frozen=True, slots=True)
class SwarmSection:
    """Which swarm."""

    name: str = key(
        "swarm",
        GENESIS,
        "the swarm's name",
        "tells swarms on one bootstrap apart",
        least=1,
        most=128,
    )
    seed: int = key(
        0,
        GENESIS,
        "seed of everything all peers draw alike",
        "same run, same overlay",
        least=0,
        most=1 << 53,
    )
    run_id: str = key(
        "",
        LOCAL,
        "nonce of this run; empty: the first peer draws one",
        "the same file run twice makes two swarms, so nothing can be replayed",
        most=64,
    )


@dataclass(frozen=True, slots=True)
class FederateSection:
    """Rounds and who takes part."""

    client_num: int = key(
        2, GENESIS, "members that round 1 waits for", "the smallest swarm", least=1, most=MAX_COUNT
    )
    total_round_num: int = key(
        10, GENESIS, "rounds of the run", "enough to see learning", least=1, most=MAX_COUNT
    )
    mode: Literal["distributed", "swarm", "neighbour", "fragment"] = key(
        "swarm",
        GENESIS,
        "`swarm` (the seed's name: `distributed`): everyone gets every update; `neighbour`: that "
        "of its neighbours alone, Metropolis weights; `fragment`: random chunks of theirs",
        "plain FedAvg semantics; the others where that is too much to send",
    )
    fragment_share: float = key(
        0.25,
        GENESIS,
        "of the chunks of a neighbour's update, the share that a peer draws in mode `fragment`",
        "a quarter of the bytes; four peers' draws hold two thirds of a model",
        above=0,
        most=1,
    )
    overlap: bool = key(
        False,
        GENESIS,
        "exchange a round while the next is trained, and take its aggregate one round late",
        "the aggregate at once; docs/how-to/overlap.md says when not",
    )
    aggregator: str = key(
        "fedavg",
        GENESIS,
        "how updates become one model: `fedavg`, `fedprox`, `scaffold`, `fedmedian`, "
        "`trimmed_mean`, `krum`, `multi_krum`, `fedadam`, `fedyogi`, `fedadagrad`, or one that the "
        "program registered",
        "best where all are honest; docs/how-to/aggregators.md says when to use which",
        least=1,
        most=64,
    )
    trim_share: float = key(
        0.2,
        GENESIS,
        "share of the versions that `trimmed_mean` leaves out on each side",
        "one dishonest peer in five",
        least=0,
        most=0.5,
    )
    byzantine: int = key(
        1,
        GENESIS,
        "dishonest peers that `krum` and `multi_krum` are to withstand",
        "its guarantee needs twice as many peers and three",
        least=0,
        most=MAX_COUNT,
    )
    server_lr: float = key(
        0.01,
        GENESIS,
        "step size of `fedadam`, `fedyogi` and `fedadagrad`",
        "about what a weight moves per round at first",
        above=0,
        most=100,
    )
    server_beta1: float = key(
        0.9, GENESIS, "how much of the first moment stays", "the paper's", least=0, most=0.9999
    )
    server_beta2: float = key(
        0.99,
        GENESIS,
        "how much of the second moment stays; unread by `fedadagrad`",
        "the paper's",
        least=0,
        most=0.9999,
    )
    server_tau: float = key(
        0.001, GENESIS, "added to the second moment's root", "the paper's", least=1e-9, most=1
    )
    importance_weighting: bool = key(
        False,
        GENESIS,
        "weigh an owner's more important chunks more, by their ranks",
        "no trial shows yet that it helps",
    )
    min_members: int = key(
        2,
        GENESIS,
        "with fewer live members a round is solo",
        "alone, no merge",
        least=2,
        most=MAX_COUNT,
    )
    join_timeout: float = key(
        120.0,
        GENESIS,
        "seconds until round 1 starts with at least `min_members`",
        "people start peers by hand",
        above=0,
        most=WEEK,
    )
    train_timeout: float = key(
        3600.0,
        GENESIS,
        "seconds of training after which the exchange window opens regardless",
        "an hour of training is a long round; set it to what yours takes",
        above=0,
        most=WEEK,
    )
    quorum: float = key(
        0.5,
        GENESIS,
        "share of live members that must publish to open the window",
        "half: one early or hostile peer moves nothing, the slower half is not waited for twice",
        least=0,
        most=1,
    )
    max_staleness: int = key(
        2,
        GENESIS,
        "rounds by which an update may be late and still count, discounted",
        "older weights pull the model back",
        least=0,
        most=1000,
    )
    max_num_samples: int = key(
        10_000_000,
        GENESIS,
        "largest num_samples an update may claim",
        "nobody can shout",
        least=1,
        most=MAX_COUNT,
    )
    on_merge: Literal["keep", "reset"] = key(
        "keep",
        LOCAL,
        "what becomes of the optimizer's state after merging",
        "momentum kept learns a little faster on most tasks",
    )


@dataclass(frozen=True, slots=True)
class TopologySection:
    """Who is whose neighbour."""

    use: bool = key(True, GENESIS, "false: everybody is everybody's neighbour", "sparse scales")
    type: Literal["star", "ring", "mesh", "tree", "full", "custom"] = key(
        "mesh", GENESIS, "shape of the overlay", "survives losses, spreads load"
    )
    connections: int = key(
        3,
        GENESIS,
        "neighbours per peer of a mesh",
        "two may fail unnoticed",
        least=1,
        most=MAX_COUNT,
    )
    arity: int = key(2, GENESIS, "children per node of a tree", "binary", least=1, most=MAX_COUNT)
    custom_graph: dict[int, list[int]] = key(
        {},
        GENESIS,
        "place in `members` -> places of its neighbours, from 1",
        "the seed's form",
        most=4096,
    )
    redraw: int = key(
        0,
        GENESIS,
        "rounds after which the overlay is drawn anew; 0: never",
        "stable edges cost no dialling; new ones now and then help sparse modes to mix",
        least=0,
        most=MAX_COUNT,
    )
    members: list[str] = key(
        [],
        GENESIS,
        "PeerIds the custom graph's places stand for; empty: order of joining",
        "an order all agree on",
        most=4096,
    )
    timeout: float = key(
        30.0,
        LOCAL,
        "seconds to open the first edges before training starts anyway",
        "a neighbour that cannot be reached must not stop the rest",
        above=0,
        most=WEEK,
    )
    max_connection_attempts: int = key(
        5,
        LOCAL,
        "tries to reach a bootstrap peer before giving up",
        "it may still be starting",
        least=1,
        most=1000,
    )


@dataclass(frozen=True, slots=True)
class BittorrentSection:
    """The exchange of chunks."""

    enable: bool = key(True, LOCAL, "false: every round is solo, nothing is sent", "to compare")
    timeout: float = key(
        600.0,
        GENESIS,
        "seconds of the exchange window",
        "the seed's; rounds close earlier",
        above=0,
        most=WEEK,
    )
    chunk_selection: Literal["rarest_first", "importance", "random"] = key(
        "rarest_first",
        LOCAL,
        "what to fetch first",
        "on ample links the rarest first; importance x age where deadlines cut rounds short",
    )
    min_completion_ratio: float = key(
        0.8,
        GENESIS,
        "below this share of bytes the window is extended once, if that can help and the round is "
        "not viable",
        "70% of the chunks is a good round",
        least=0,
        most=1,
    )
    critical_share: float = key(
        CRITICAL_SHARE,
        GENESIS,
        "a round is viable once this share of an update's chunks, the most important ones, is here "
        "of the updates of a quorum of members; a viable round is not extended",
        "in a trial, rounds of the important 20 to 40% came within 0.5 to 1.2 points of whole ones",
        above=0,
        most=1,
    )
    active_requests: int = key(
        10, LOCAL, "open requests per neighbour", "the seed's active pool", least=1, most=64
    )
    pending_requests: int = key(
        20, LOCAL, "chunks begun at a time", "the seed's pending pool", least=1, most=10_000
    )
    endgame_holders: int = key(
        2, LOCAL, "holders asked for an overdue block", "the seed's", least=1, most=16
    )
    upload_slots: int = key(
        4, LOCAL, "peers served at once, one more at random", "BitTorrent's", least=1, most=1000
    )
    fill_max_age: int = key(
        5,
        GENESIS,
        "rounds for which an owner's last received chunk fills a missing one",
        "old values still beat none on starved links",
        least=0,
        most=1000,
    )
    fill: Literal["last", "recycle", "renormalise", "round_start"] = key(
        "last",
        GENESIS,
        "what stands in for an owner's missing chunk: its last received one, the change that this "
        "made then added to the round-start value, nothing, or the round-start value",
        "the last one kept peers closest in trials",
    )
    fill_decay: float = key(
        0.7,
        GENESIS,
        "factor on the weight of a chunk that `fill: last` or `recycle` put in, for each round of "
        "its age",
        "old values pull a model back: below 1 gains where 20% or more arrives, little is lost at "
        "10% (docs/results)",
        above=0,
        most=1,
    )
    linger: float = key(
        10.0,
        LOCAL,
        "seconds at most to go on serving after the last round",
        "seeding",
        least=0,
        most=WEEK,
    )


@dataclass(frozen=True, slots=True)
class L2NormSection:
    """Settings of `importance_method: l2_norm`."""

    depth_boost: float = key(
        0.3, LOCAL, "extra weight of the deepest layer", "the seed's", least=0, most=100
    )
    normalize_by_size: bool = key(True, LOCAL, "divide by sqrt(size)", "big chunks do not win")


@dataclass(frozen=True, slots=True)
class MagnitudeSection:
    """Settings of `importance_method: magnitude`."""

    history_window: int = key(
        10, LOCAL, "rounds whose gradients are pooled", "the seed's", least=1, most=1000
    )
    use_variance: bool = key(True, LOCAL, "multiply by 1 + variance of the gradient", "the seed's")


@dataclass(frozen=True, slots=True)
class SnipSection:
    """Settings of `importance_method: snip`."""

    batch_size: int = key(
        128,
        LOCAL,
        "samples of the mini-batch where `use_cached` is false",
        "the seed's",
        least=1,
        most=MAX_COUNT,
    )
    use_cached: bool = key(
        True, LOCAL, "use a gradient of the user's own training", "no second pass over data"
    )


@dataclass(frozen=True, slots=True)
class FisherSection:
    """Settings of `importance_method: fisher`."""

    num_samples: int = key(
        100,
        LOCAL,
        "gradients that are squared in a round at most: mini-batches', or samples' where they are "
        "given, of which a short round affords fewer",
        "the seed's",
        least=1,
        most=MAX_COUNT,
    )
    damping: float = key(
        0.001,
        LOCAL,
        "added to each squared gradient, as a share of the model's mean of them",
        "the seed's figure; relative, so that the loss's scale does not matter",
        least=0,
        most=100,
    )


@dataclass(frozen=True, slots=True)
class AdaptiveSection:
    """Settings of `importance_method: adaptive`."""

    early: PlainMethod = key("change", LOCAL, "method while the loss falls", "needs no gradients")
    late: PlainMethod = key(
        "fisher", LOCAL, "method once the loss hardly falls", "best in a trial, as x age"
    )
    slow: float = key(
        0.02,
        LOCAL,
        "share of the loss by which it falls in a round that counts as late; twice that is early",
        "above the noise of a small data set's loss",
        above=0,
        most=1,
    )
    patience: int = key(
        3, LOCAL, "rounds in a row before a switch", "one odd round is none", least=1, most=1000
    )


@dataclass(frozen=True, slots=True)
class ImportanceSection:
    """Settings per importance method."""

    magnitude: MagnitudeSection = section(MagnitudeSection)
    l2_norm: L2NormSection = section(L2NormSection)
    snip: SnipSection = section(SnipSection)
    fisher: FisherSection = section(FisherSection)
    adaptive: AdaptiveSection = section(AdaptiveSection)


Cutting = Literal["auto", "uniform", "cnn", "transformer", "hybrid", "small", "large"]


@dataclass(frozen=True, slots=True)
class ChunkSection:
    """How the model is cut, and what is exchanged of it."""

    num_chunks: int = key(
        20,
        GENESIS,
        "chunks to aim at",
        "the seed's; of a tiny model fewer, of 8 KiB",
        least=1,
        most=MAX_CHUNKS,
    )
    architecture: Literal["auto", "uniform", "cnn", "transformer", "hybrid", "small", "large"] = (
        key(
            "auto",
            GENESIS,
            "what the model is cut along: layers and attention blocks, in chunks of a size that "
            "suits such a model; `uniform` is `num_chunks` in the order of the tensors",
            "read from the model's modules; docs/adr/0005 has the sizes' rule",
        )
    )
    block_size: int = key(
        65536,
        GENESIS,
        "bytes of a block: requested, hashed and verified at once",
        "4 s of a 128 kbit/s link; hashes are 0.05% of the payload",
        least=1024,
        most=262144,
    )
    importance_method: ImportanceMethod = key(
        "auto",
        LOCAL,
        "how a chunk's importance is scored; `magnitude`, `snip` and `fisher` need `gradients=`. "
        "`auto`: without them `change`, with them by the architecture: `magnitude` for a CNN, "
        "`fisher` for a Transformer, `adaptive` for a hybrid, `l2_norm` below 10 M parameters, "
        "`snip` above 100 M",
        "the seed's choices; `change` needs no gradients and did well in trials",
    )
    importance_config: ImportanceSection = section(ImportanceSection)
    include: list[str] = key(
        ["*"], GENESIS, "globs of tensors to exchange", "everything", least=1, most=1024
    )
    exclude: list[str] = key(
        [], GENESIS, "globs of tensors that stay home", "private heads", most=1024
    )
    compression: Codec = key(
        "none",
        GENESIS,
        "how chunk files are made smaller: `fp16` and `bf16` halve float32, `int8` with a scale "
        "per row quarters it, `topk` sends the largest changes alone",
        "exact; docs/how-to/compression.md says when to use which",
    )
    delta: bool = key(
        False,
        GENESIS,
        "send floats as the change since the round's start; `topk` always does",
        "whole weights average well where peers' start weights differ",
    )
    topk_share: float = key(
        0.1,
        GENESIS,
        "share of the changes that `topk` sends; the rest is added to the next round's",
        "a fifth of the bytes, as each needs an index",
        above=0,
        most=1,
    )
    zstd_level: int = key(
        0,
        GENESIS,
        "zstd on top of the codec, its level; 0: none",
        "trained floats hardly shrink; int8 and deltas may",
        least=0,
        most=MAX_ZSTD_LEVEL,
    )
    norm_policy: Literal["average", "local", "recalibrate"] = key(
        "average", GENESIS, "what becomes of normalisation layers", "FedAvg; local is FedBN"
    )


@dataclass(frozen=True, slots=True)
class NetworkSection:
    """Addresses."""

    listen: list[str] = key(
        ["/ip4/127.0.0.1/tcp/0"],
        LOCAL,
        "multiaddrs to listen on",
        "nobody outside this machine; use /ip4/0.0.0.0/tcp/4001 to be reached",
        least=1,
        most=16,
    )
    bootstrap: list[str] = key(
        [],
        LOCAL,
        "multiaddrs of peers to enter through; empty: this peer founds the swarm",
        "any member or `p2pfl-torrent bootstrap` will do; several may be listed",
        most=64,
    )
    announce: list[str] = key(
        [], LOCAL, "multiaddrs told to others instead of the listening ones", "behind NAT", most=16
    )


@dataclass(frozen=True, slots=True)
class SecuritySection:
    """Who may take part."""

    allow: list[str] = key(
        [], LOCAL, "PeerIds to exchange with; empty: everybody", "open swarm", most=4096
    )


@dataclass(frozen=True, slots=True)
class StorageSection:
    """Where things are kept."""

    state_dir: str = key(
        "",
        LOCAL,
        "identity, updates and checkpoints; empty: temporary, gone at the end",
        "give one to resume after a crash",
    )
    run_dir: str = key("", LOCAL, "events.jsonl and the other logs; empty: none", "a clean default")
    keep_rounds: int = key(
        2, LOCAL, "rounds whose updates are kept for others", "stragglers", least=1, most=1000
    )


@dataclass(frozen=True, slots=True)
class TaskSection:
    """What `p2pfl-torrent join` trains; a program that embeds `Peer` has its own."""

    recipe: str = key("digits", LOCAL, "data set, model and defaults", "ships with scikit-learn")
    partition: str = key(
        "", LOCAL, "iid, dirichlet(ALPHA) or label_skew(N); empty: the recipe's", "non-IID"
    )
    part: int = key(
        0,
        LOCAL,
        "which part of the data is this peer's, from 1; 0: --part says",
        "one file serves all peers",
        least=0,
        most=MAX_COUNT,
    )
    parts: int = key(
        0, LOCAL, "parts the data is cut into; 0: client_num", "one each", least=0, most=MAX_COUNT
    )
    epochs: int = key(
        0,
        LOCAL,
        "local epochs per round; 0: the recipe's",
        "the recipe was measured",
        least=0,
        most=MAX_COUNT,
    )
    lr: float = key(
        0.0, LOCAL, "learning rate; 0: the recipe's", "the recipe was measured", least=0, most=1000
    )
    batch_size: int = key(
        0,
        LOCAL,
        "samples per step; 0: the recipe's",
        "the recipe was measured",
        least=0,
        most=MAX_COUNT,
    )
    data_root: str = key(
        "",
        LOCAL,
        "folder of the recipe's data files; empty: that of P2PFL_TORRENT_DATA",
        "digits needs none",
    )
    download: bool = key(
        False,
        LOCAL,
        "let torchvision fetch data that is not there",
        "nothing is fetched unasked",
    )
