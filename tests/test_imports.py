"""What a peer loads before anybody asks for it: memory and start-up time of every process."""

from __future__ import annotations

import subprocess
import sys

import pytest

COSTLY = ("torch", "networkx", "rich", "sklearn", "torchvision")  # 135, 11 and more MB


def loaded_by(module: str) -> list[str]:
    """Which of the costly packages an interpreter has loaded after it imported a module."""
    program = f"import sys, {module}; print(*(set({COSTLY}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("module", ["p2pfl_torrent", "p2pfl_torrent.peer", "p2pfl_torrent.config"])
def test_a_package_loads_nothing_before_it_is_used(module: str) -> None:
    assert not loaded_by(module)


def test_a_node_needs_no_torch() -> None:
    assert not loaded_by("p2pfl_torrent.peer.node")


def test_a_recipe_trains_without_torchs_compiler_and_the_library_of_its_data() -> None:
    program = """
import sys
from p2pfl_torrent.cli.task import load_tasks
from p2pfl_torrent.config import PeerConfig
[task] = load_tasks(PeerConfig(), 2, [1])
trainer = task.trainer()
trainer.train(1)
task.score(trainer.model)
print(*({"torch._dynamo", "sympy", "sklearn"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert not done.stdout.split()


def test_the_faces_are_there_when_asked_for() -> None:
    program = "from p2pfl_torrent.peer import AsyncPeer, Peer, PeerStoppedError"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name_is_an_error() -> None:
    from p2pfl_torrent import peer

    with pytest.raises(AttributeError, match="no attribute 'Pear'"):
        _ = peer.Pear
