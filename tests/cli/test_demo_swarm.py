from __future__ import annotations

from pathlib import Path

import pytest

from p2pfl_torrent.cli.arguments import parse
from p2pfl_torrent.cli.demo_swarm import bound, demo_config, read_graph, topology_of
from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.recipes import RECIPES

GRAPH = Path(__file__).resolve().parent.parent.parent / "examples" / "custom_graph.yaml"


def config_of(*arguments: str) -> PeerConfig:
    return demo_config(parse(["demo", *arguments]))


def test_the_defaults_are_six_peers_on_a_mesh() -> None:
    config = config_of()
    assert (config.federate.client_num, config.federate.total_round_num) == (6, 8)
    assert topology_of(config) == "mesh of 3"


def test_every_argument_reaches_the_peers() -> None:
    config = config_of(
        "--peers", "9", "--rounds", "3", "--connections", "4", "--partition", "label_skew(2)",
        "--epochs", "2", "--seed", "7",
    )  # fmt: skip
    assert (config.federate.client_num, config.federate.total_round_num) == (9, 3)
    assert (config.topology.connections, config.swarm.seed) == (4, 7)
    assert (config.task.partition, config.task.epochs) == ("label_skew(2)", 2)


def test_the_data_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = config_of("--recipe", "mnist", "--data", "images", "--download").task
    assert (task.recipe, task.data_root) == ("mnist", str(tmp_path / "images"))
    assert task.download
    assert not config_of().task.download


def test_a_slow_recipe_gets_its_own_rounds_and_more_time() -> None:
    digits, mnist = config_of(), config_of("--recipe", "mnist")
    assert mnist.federate.total_round_num == RECIPES["mnist"].rounds
    longer = 2 * RECIPES["mnist"].epoch_seconds  # half the cores are busy with the comparison
    assert mnist.federate.train_timeout > digits.federate.train_timeout + longer
    assert mnist.bittorrent.timeout > digits.bittorrent.timeout + longer


def test_an_unknown_recipe_is_told() -> None:
    with pytest.raises(ConfigError, match=r"'minst' is not known: did you mean mnist\?"):
        config_of("--recipe", "minst")


@pytest.mark.parametrize("topology", ["star", "ring", "tree", "full"])
def test_topologies_by_name(topology: str) -> None:
    assert topology_of(config_of("--topology", topology)) == topology


def test_the_seeds_graph_makes_five_peers() -> None:
    config = config_of("--graph", str(GRAPH))
    assert (config.topology.type, config.federate.client_num) == ("custom", 5)
    assert config.topology.custom_graph == {
        1: [2, 3, 4], 2: [1, 5], 3: [1, 4, 5], 4: [1, 3], 5: [2, 3],
    }  # fmt: skip
    assert config_of("--topology", "custom", "--graph", str(GRAPH)) == config


def test_a_graph_counts_those_it_names_as_neighbours_only(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text("1: [2, 4]\n3: [1]\n")
    assert config_of("--graph", str(file)).federate.client_num == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1: two", "must hold lines such as '1: \\[2, 3\\]'"),
        ("[", "cannot be read: it is not YAML"),
        ("{}", "has 0 peers: a demo takes 2 to 500"),
        ("1: [900]", "has 900 peers: a demo takes 2 to 500"),
        ("1: [2, 0]", "names member 0"),
        ("1: [1, 2]", "its own neighbour"),
    ],
)
def test_a_graph_that_cannot_be_is_told(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        config_of("--graph", str(file))


def test_peers_and_graph_must_agree() -> None:
    assert config_of("--graph", str(GRAPH), "--peers", "5").federate.client_num == 5
    with pytest.raises(ConfigError, match=r"--peers says 6, but .* has 5 peers"):
        config_of("--graph", str(GRAPH), "--peers", "6")


@pytest.mark.parametrize("wrap", ["{}", "custom_graph: {}", "topology: {{custom_graph: {}}}"])
def test_a_graph_is_found_in_the_seeds_sections(wrap: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(wrap.format("{1: [2], 2: [1]}"))
    assert read_graph(file) == {1: [2], 2: [1]}


def test_the_bound_covers_every_wait_the_configuration_allows() -> None:
    arguments = parse(["demo", "--rounds", "4"])
    config = demo_config(arguments)
    federate, torrent = config.federate, config.bittorrent
    a_round = federate.train_timeout + 2 * torrent.timeout
    assert bound(arguments, config) >= federate.join_timeout + 4 * a_round
    assert bound(parse(["demo", "--timeout", "3"]), config) == 3
