from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.config import PeerConfig, reference
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.genesis import Terms, decode_terms, difference, encode_terms
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec

ROOT = Path(__file__).parent.parent
PEER = "12D3KooWSDq3NPZBpjCNpqUv3KzFZmZ3g7ERceJyaCZ9bArpRfMy"
SPEC = ModelSpec((TensorSpec("w", "F32", (100, 10)), TensorSpec("b", "F32", (10,))))

SEED_EXAMPLE = """
federate:
  client_num: 10
  total_round_num: 50
  mode: distributed

topology:
  use: true
  type: mesh  # star, ring, mesh, tree, custom
  connections: 3  # connections per node
  timeout: 120.0
  max_connection_attempts: 5

bittorrent:
  enable: true
  timeout: 600.0
  chunk_selection: rarest_first
  min_completion_ratio: 0.8

chunk:
  num_chunks: 20
  importance_method: l2_norm
  importance_config:
    l2_norm:
      depth_boost: 0.3
      normalize_by_size: true
"""


def load(tmp_path: Path, text: str) -> PeerConfig:
    file = tmp_path / "swarm.yaml"
    file.write_text(text)
    return PeerConfig.load(file)


def test_the_seeds_own_example_loads(tmp_path: Path) -> None:
    config = load(tmp_path, SEED_EXAMPLE)
    assert config.federate.client_num == 10
    assert config.bittorrent.timeout == 600.0
    terms = config.terms(SPEC, config.plan_layout(SPEC))
    assert terms.mode == "swarm"
    assert terms.rounds.exchange_timeout == 600.0


def test_examples_load() -> None:
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert examples
    for file in examples:
        data = yaml.safe_load(file.read_text())
        if "custom_graph" in data.get("topology", {}):
            data.setdefault("federate", {})["client_num"] = len(data["topology"]["custom_graph"])
        PeerConfig.from_mapping(data)


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n", "federate:\nchunk:\n"])
def test_what_is_left_out_is_the_default(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == PeerConfig()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bittorrent: {timout: 3}", "timout is not a key; did you mean bittorrent.timeout?"),
        ("num_chunks: 3", "num_chunks is not a key; did you mean chunk.num_chunks?"),
        ("federat: {}", "federat is not a key"),
        ("topology: {timeouts: 3}", "did you mean topology.timeout?"),
        ("{1: 2}", "1 is not a key"),
        ("bittorrent: {timeout: soon}", "bittorrent.timeout must be a number, not 'soon'."),
        ("federate: {client_num: true}", "federate.client_num must be a whole number, not True."),
        ("chunk: {include: w}", "chunk.include must be a list, not 'w'."),
        ("chunk: {include: [1]}", "chunk.include[0] must be text, not 1."),
        ("federate: 3", "federate must hold keys"),
        ("- a", "the file must hold keys"),
        ("federate: {mode: standalone}", "use distributed or swarm or neighbour or fragment."),
        ("chunk: {importance_method: snipp}", "may not be 'snipp'"),
        ("chunk: {importance_config: {fisher: {dampin: 1}}}", "did you mean chunk.importance_con"),
        ("chunk: {importance_config: {adaptive: {slow: 0}}}", "slow is 0.0: it must be above 0"),
        ("bittorrent: {timeout: .nan}", "timeout is nan: it must be above 0, at most 604,800."),
        ("bittorrent: {timeout: .inf}", "timeout is inf"),
        ("federate: {quorum: 1.5}", "quorum is 1.5: it must be from 0 to 1."),
        ("federate: {client_num: 99999999999}", "client_num is 99999999999"),
        ("chunk: {num_chunks: 70000}", "from 1 to 65,536"),
        ("chunk: {include: []}", "chunk.include has 0 entries"),
        (f"swarm: {{run_id: {'x' * 65}}}", "run_id has 65 characters: it may have at most 64."),
        ("{federate: {mode: fragment}, chunk: {delta: true}}", "chunk.delta needs a round's start"),
        ("federate: {mode: neighbour, aggregator: fedadam}", "choose another, or mode: swarm."),
        ("federate: {mode: neighbour, importance_weighting: true}", "has weights of its own"),
        ("federate: {aggregator: fedmedian}", "federate.client_num of at least 3, not 2"),
        ("federate: {aggregator: krum}", "which needs federate.client_num of"),
        ("{federate: {mode: fragment}, bittorrent: {fill: recycle}}", "recycle needs a round's st"),
        ("federate: {aggregator: krum, client_num: 4}", "needs federate.client_num of at least 5,"),
        ("federate: {aggregator: scaffold, overlap: true}", "overlap is on, but scaffold corrects"),
        ("federate: {mode: neighbour, aggregator: scaffold}", "choose another, or mode: swarm."),
        ("federate: {min_members: 5}", "above federate.client_num (2)"),
        ("network: {listen: [tcp]}", "network.listen: 'tcp' is not of the form"),
        ("network: {bootstrap: [/ip4/1.2.3.4/tcp/1]}", "network.bootstrap"),
        ("security: {allow: [me]}", "security.allow: 'me'"),
        ("topology: {type: custom}", "custom_graph is empty"),
        ("topology: {type: custom, custom_graph: {1: [9]}}", "names member 9"),
        ("topology: {custom_graph: {1: [2]}}", "make the type custom"),
        ("federate: {client_num: 3, client_num: 4}", "near line 1: client_num stands there twice"),
        ("a: [", "not valid YAML near line 1"),
        ("a: !!python/object:os.system {}", "not valid YAML near line 1"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_with_file_and_key(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    told = str(raised.value)
    assert told.startswith(f"{tmp_path / 'swarm.yaml'}: ")
    assert sentence in told
    assert "\n" not in told


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        PeerConfig.load(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not valid YAML"):
        PeerConfig.load(tmp_path / "binary.yaml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = [row.path for row in reference()]


@given(st.sampled_from(KEYS), plain)
def test_any_value_at_any_key_is_taken_or_refused_by_name(path: str, value: Any) -> None:
    data: dict[str, Any] = {}
    place = data
    *groups, name = path.split(".")
    for group in groups:
        place = place.setdefault(group, {})
    place[name] = value
    try:
        PeerConfig.from_mapping(data)
    except ConfigError as error:
        assert groups[0] in str(error)  # noqa: PT017 - most values are refused, some are not


def test_with_values_checks_as_a_file_does() -> None:
    config = PeerConfig().with_values(
        bittorrent__timeout=30, chunk__importance_config__l2_norm__depth_boost=0.5
    )
    assert config.bittorrent.timeout == 30.0
    assert config.chunk.importance_config.l2_norm.depth_boost == 0.5
    assert PeerConfig().bittorrent.timeout == 600.0
    for wrong in ({"bittorrent__timout": 3}, {"bittorrent__timeout": "soon"}, {"swarm": 3},
                  {"swarm__name__first": "x"}, {"federate__client_num": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            PeerConfig().with_values(**wrong)


def test_yaml_and_mapping_lead_back(tmp_path: Path) -> None:
    config = PeerConfig().with_values(
        topology__type="custom",
        topology__custom_graph={2: [1], 1: [2]},
        topology__members=[PEER, PEER[:-1] + "x"],
        network__bootstrap=[f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"],
        swarm__name="größe: 3",
    )
    assert load(tmp_path, config.to_yaml()) == config
    assert PeerConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (200, 1), (1024, 5), (10_000, 20)])
def test_a_tiny_model_is_cut_into_fewer_chunks(rows: int, chunks: int) -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (rows, 10)),))
    assert len(PeerConfig().plan_layout(spec).chunks) == chunks


def test_every_genesis_key_changes_what_peers_must_share_and_no_local_one_does() -> None:
    """A key's scope in the reference is what the code does with it."""
    other: dict[str, object] = {
        "swarm.name": "other", "swarm.seed": 7, "swarm.run_id": "x",
        "federate.client_num": 5, "federate.total_round_num": 3, "federate.min_members": 3,
        "federate.join_timeout": 5.0, "federate.train_timeout": 5.0, "federate.quorum": 0.75,
        "federate.max_staleness": 1, "federate.max_num_samples": 5, "federate.on_merge": "reset",
        "topology.use": False, "topology.type": "ring", "topology.connections": 4,
        "topology.arity": 3, "topology.timeout": 5.0, "topology.max_connection_attempts": 2,
        "bittorrent.enable": False, "bittorrent.timeout": 5.0,
        "bittorrent.chunk_selection": "random", "bittorrent.min_completion_ratio": 0.5,
        "bittorrent.active_requests": 3, "bittorrent.pending_requests": 3,
        "bittorrent.endgame_holders": 1, "bittorrent.upload_slots": 2,
        "bittorrent.fill_max_age": 1, "bittorrent.linger": 1.0, "chunk.num_chunks": 3,
        "chunk.architecture": "cnn",
        "chunk.block_size": 4096, "chunk.importance_method": "random",
        "chunk.importance_config.magnitude.history_window": 3,
        "chunk.importance_config.magnitude.use_variance": False,
        "chunk.importance_config.snip.batch_size": 3,
        "chunk.importance_config.snip.use_cached": False,
        "chunk.importance_config.fisher.num_samples": 3,
        "chunk.importance_config.fisher.damping": 0.5,
        "chunk.importance_config.adaptive.early": "delta",
        "chunk.importance_config.adaptive.late": "delta",
        "chunk.importance_config.adaptive.slow": 0.5,
        "chunk.importance_config.adaptive.patience": 5,
        "network.listen": ["/ip4/127.0.0.1/tcp/1"], "network.announce": ["/ip4/1.2.3.4/tcp/1"],
        "network.bootstrap": [f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}"], "security.allow": [PEER],
        "chunk.compression": "int8", "chunk.delta": True, "chunk.zstd_level": 3,
        "federate.aggregator": "fedmedian", "federate.trim_share": 0.1, "federate.byzantine": 2,
        "federate.server_lr": 0.1, "federate.server_beta1": 0.5, "federate.server_beta2": 0.5,
        "federate.server_tau": 0.01, "federate.importance_weighting": True,
        "bittorrent.fill": "renormalise", "bittorrent.fill_decay": 0.5,
        "bittorrent.critical_share": 0.5,
        "federate.mode": "neighbour", "topology.redraw": 3, "federate.overlap": True,
        "storage.state_dir": "s", "storage.run_dir": "r", "storage.keep_rounds": 5,
    }  # fmt: skip
    base = PeerConfig().with_values(federate__client_num=4, federate__min_members=2)
    spec = ModelSpec((TensorSpec("w", "F32", (10_000, 10)), TensorSpec("b", "F32", (10,))))
    ours = base.terms(spec, base.plan_layout(spec))
    scopes = {row.path: row.scope for row in reference()}
    for path, value in other.items():
        config = base.with_values(**{path.replace(".", "__"): value})
        theirs = config.terms(spec, config.plan_layout(spec))
        assert (theirs != ours) == (scopes[path] == "genesis"), path
        if theirs != ours:
            assert difference(ours, theirs)
    # Read in one mode only, needs custom or topk, decided by the model spec, or read by join alone:
    untried = set(scopes) - set(other)
    assert {path for path in untried if not path.startswith("task.")} == {
        "federate.fragment_share", "topology.custom_graph", "topology.members",
        "chunk.importance_config.l2_norm.depth_boost",
        "chunk.importance_config.l2_norm.normalize_by_size",
        "chunk.include", "chunk.exclude", "chunk.norm_policy", "chunk.topk_share",
    }  # fmt: skip


def test_a_fragments_share_is_agreed_on_in_its_mode_alone() -> None:
    spec = ModelSpec((TensorSpec("w", "F32", (10_000, 10)),))

    def terms(mode: str, share: float) -> Terms:
        config = PeerConfig().with_values(federate__mode=mode, federate__fragment_share=share)
        return config.terms(spec, config.plan_layout(spec))

    assert terms("swarm", 0.5) == terms("distributed", 0.25)
    assert terms("fragment", 0.5) != terms("fragment", 0.25)


def test_terms_are_what_another_peer_can_read() -> None:
    """Every bound here is within what the genesis' decoder takes."""
    most = PeerConfig().with_values(
        federate__client_num=1 << 31,
        federate__total_round_num=1 << 31,
        federate__max_num_samples=1 << 31,
        federate__max_staleness=1000,
        federate__join_timeout=7 * 86400,
        swarm__seed=1 << 53,
        swarm__name="x" * 128,
        topology__connections=1 << 31,
        bittorrent__fill_max_age=1000,
    )
    terms = most.terms(SPEC, most.plan_layout(SPEC))
    assert decode_terms(encode_terms(terms)) == terms


def test_the_order_of_a_custom_graph_does_not_matter() -> None:
    def terms(graph: dict[int, list[int]]) -> object:
        return (
            PeerConfig()
            .with_values(
                federate__client_num=3, topology__type="custom", topology__custom_graph=graph
            )
            .topology_terms()
        )

    assert terms({1: [3, 2], 2: [1]}) == terms({2: [1], 1: [2, 3]})


def test_without_an_overlay_everybody_is_a_neighbour() -> None:
    assert PeerConfig().with_values(topology__use=False).topology_terms().type == "full"


def test_every_key_has_its_meaning_reason_and_bounds() -> None:
    for row in reference():
        assert row.meaning, row.path
        assert row.why, row.path
        assert row.scope in ("genesis", "local"), row.path
        if re.match(r"(whole )?number(?!:)", row.type):
            assert re.search(r"from|above", row.type), f"{row.path} has no bounds"
    assert msgspec.json.encode(list(reference()))
