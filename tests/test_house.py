"""The house keeps its own rules, and the checker that says so can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house_rules import ROOMS, everywhere_violations, package_violations

ROOT = Path(__file__).parent.parent
FOLDERS = ("p2pfl_torrent", "testnet", "benchmarks", "scripts", "tests")


def plant(root: Path, path: str, source: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


def test_every_room_imports_only_what_it_may() -> None:
    assert (ROOT / "p2pfl_torrent" / "core").is_dir()
    found = package_violations(ROOT)
    assert not found, "the import rule is broken:\n" + "\n".join(map(str, found))


def test_no_code_runs_what_it_reads_and_every_file_has_a_name() -> None:
    found = everywhere_violations(ROOT, FOLDERS)
    assert not found, "\n".join(map(str, found))


def test_the_rooms_on_one_floor_never_import_each_other() -> None:
    floor = {"protocols", "overlay", "learning", "store"}
    for name in floor:
        assert not ROOMS[name].rooms & floor
    assert [name for name, room in ROOMS.items() if "torch" in room.packages] == ["learning"]


def test_imports_only_go_down() -> None:
    def below(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"rooms import in a circle: {' -> '.join((*above, name))}"
        for lower in ROOMS[name].rooms:
            below(lower, (*above, name))

    for name in ROOMS:
        below(name, ())


@pytest.mark.parametrize(
    ("path", "source", "line", "what"),
    [
        ("core/a.py", "import json\nimport trio\n", 2, "may not import trio"),
        ("core/a.py", "def f():\n    import torch\n", 2, "may not import torch"),
        ("core/a.py", "import time\n", 1, "sans-IO"),
        ("core/a.py", "from pathlib import Path\n", 1, "sans-IO"),
        ("core/a.py", "import logging\n", 1, "sans-IO"),
        ("core/a.py", "import random\n\nrandom.random()\n", 3, "random.random"),
        ("core/a.py", "from random import shuffle\n", 1, "random.shuffle"),
        ("core/a.py", "import random as chance\nchance.shuffle([])\n", 2, "random.shuffle"),
        ("core/a.py", "import random\nr = random.Random()\n", 2, "without a seed"),
        ("core/a.py", "import numpy as np\nnp.random.rand(3)\n", 2, "numpy.random.rand"),
        ("core/a.py", "import numpy as np\nnp.random.default_rng()\n", 2, "without a seed"),
        ("core/a.py", "import numpy as np\nnp.load('x')\n", 2, "numpy.load"),
        ("core/a.py", "import numpy as np\nnp.memmap('x')\n", 2, "numpy.memmap"),
        ("core/a.py", "from safetensors.torch import save\n", 1, "framework"),
        ("core/a.py", "from safetensors.numpy import save_file\n", 1, "save_file"),
        ("core/a.py", "x = 1\nopen('x')\n", 2, "calls open()"),
        ("core/a.py", "from p2pfl_torrent.store import x\n", 1, "p2pfl_torrent.store"),
        ("core/a.py", "from p2pfl_torrent import Peer\n", 1, "may not import p2pfl_torrent"),
        ("core/a.py", "from p2pfl_torrent import overlay\n", 1, "p2pfl_torrent.overlay"),
        ("core/a.py", "from .. import overlay\n", 1, "p2pfl_torrent.overlay"),
        ("core/sub/a.py", "from ...store import x\n", 1, "relative import"),
        ("store/a.py", "from ..core import x\n", 1, "relative import"),
        ("store/a.py", "from p2pfl_torrent.core.b import _x\n", 1, "private"),
        ("store/a.py", "from p2pfl_torrent.core._b import x\n", 1, "private"),
        ("store/a.py", "import importlib\nimportlib.import_module('torch')\n", 2, "import_module"),
        ("store/a.py", "__import__('torch')\n", 1, "__import__"),
        (
            "store/a.py",
            "import p2pfl_torrent.core as _\nimport p2pfl_torrent.core\np2pfl_torrent.peer.x\n",
            3,
            "p2pfl_torrent.peer",
        ),
        ("exchange/a.py", "import libp2p\n", 1, "may not import libp2p"),
        ("exchange.py", "import asyncio\n", 1, "trio"),
        ("protocols/a.py", "import p2pfl_torrent.overlay.b\n", 1, "p2pfl_torrent.overlay"),
        ("overlay/a.py", "from p2pfl_torrent.learning import x\n", 1, "p2pfl_torrent.learning"),
        ("learning/a.py", "import trio\n", 1, "may not import trio"),
        ("peer.py", "import torch\n", 1, "may not import torch"),
        ("progress.py", "from p2pfl_torrent.core import swarm\n", 1, "p2pfl_torrent.core"),
        ("core/a.py", "import benchmarks\n", 1, "may not import benchmarks"),
        ("attic.py", "x = 1\n", 1, "not a room"),
    ],
)
def test_a_planted_import_is_found(
    tmp_path: Path, path: str, source: str, line: int, what: str
) -> None:
    plant(tmp_path, f"p2pfl_torrent/{path}", source)
    found = package_violations(tmp_path)
    assert any(
        violation.path == f"p2pfl_torrent/{path}"
        and violation.line == line
        and what in violation.what
        for violation in found
    ), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/a.py", "import random\n\ndef f(rng: random.Random) -> None: ...\n"),
        ("core/a.py", "from random import Random\nr = Random(7)\n"),
        ("core/a.py", "import numpy as np\n\ndef f(rng: np.random.Generator) -> None: ...\n"),
        ("core/a.py", "import numpy as np\n\ndef f(data: np.memmap) -> None: ...\n"),
        ("core/a.py", "import io\nb = io.BytesIO()\nfrom .b import x\nfrom . import c\n"),
        ("core/a.py", "def f(self):\n    self.open()\n    return self.random.random()\n"),
        ("core/sub/a.py", "from ..b import x\nfrom p2pfl_torrent.core import b\n"),
        ("learning/a.py", "import torch\nfrom safetensors.torch import save\n"),
        ("cli.py", "from p2pfl_torrent import __version__\nfrom p2pfl_torrent.peer import Peer\n"),
        ("__init__.py", "from p2pfl_torrent.peer import Peer\n"),
        ("__main__.py", "from p2pfl_torrent.cli import main\n"),
    ],
)
def test_what_a_room_may_do_is_left_alone(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, f"p2pfl_torrent/{path}", source)
    assert package_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "source", "what"),
    [
        ("testnet/utils.py", "", "says nothing"),
        ("testnet/net_helpers/a.py", "", "says nothing"),
        ("testnet/a.py", "import pickle\n", "pickle"),
        ("testnet/a.py", "def f():\n    from cloudpickle import loads\n", "cloudpickle"),
        ("testnet/a.py", "import torch as t\nt.load('x')\n", "torch.load"),
        ("testnet/a.py", "from torch import load\n", "torch.load"),
        ("testnet/a.py", "eval('1')\n", "eval"),
        ("testnet/a.py", "run = exec\n", "exec"),
        ("testnet/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", "unpickle"),
    ],
)
def test_planted_danger_is_found(tmp_path: Path, path: str, source: str, what: str) -> None:
    plant(tmp_path, path, source)
    found = everywhere_violations(tmp_path, ("testnet",))
    assert found
    assert what in str(found[0])
    assert str(found[0]).startswith(f"{path}:")


def test_a_models_own_eval_and_numpys_safe_load_are_left_alone(tmp_path: Path) -> None:
    plant(tmp_path, "testnet/a.py", "model.eval()\nnp.load('x', allow_pickle=False)\n")
    assert everywhere_violations(tmp_path, ("testnet",)) == []
