"""Peers that exchange a part of their models: adapters alone, or all but their heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import nn

from p2pfl_torrent import AsyncPeer, RoundReport
from p2pfl_torrent.learning.state import describe
from tests.peer.swarms import PATIENCE, config

State = dict[str, torch.Tensor]
Make = Callable[[int], nn.Module]
SAMPLES = (1, 3)


class LoRALinear(nn.Module):
    """``W x + b + B A x``, of which A and B are learnt (Hu et al., ICLR 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + x @ self.lora_a.t() @ self.lora_b.t()
        return out


def adapted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(LoRALinear(48, 64), nn.ReLU(), LoRALinear(64, 10))


class Personal(nn.Module):
    """A body that all share, and a head for the classes that this peer has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 3 + seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def train(model: nn.Module, seed: int) -> None:
    """Steps of SGD on noise: whatever requires a gradient changes."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=generator)
        torch.autograd.backward(model(x).square().mean())
        optimizer.step()


def state_of(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


class Run:
    """Two peers, of which the second leaves after round 1 and comes back for round 2.

    Attributes:
        trained: (place, round) -> the peer's whole state when it had trained.
        merged: (place, round) -> the state after the exchange.
        reports: likewise.
    """

    def __init__(self, make: Make, chunk: dict[str, Any], folder: Path):
        self._make = make
        self._chunk = chunk
        self._folder = folder
        self._is_back = trio.Event()
        self.trained: dict[tuple[int, int], State] = {}
        self.merged: dict[tuple[int, int], State] = {}
        self.reports: dict[tuple[int, int], RoundReport] = {}

    def _peer(self, place: int, model: nn.Module, bootstrap: list[str]) -> AsyncPeer:
        sections = {"chunk": self._chunk}
        return AsyncPeer(config(2, bootstrap, str(self._folder / str(place)), sections), model)

    async def play(self) -> None:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                model = self._make(0)
                founder = self._peer(0, model, [])
                nursery.start_soon(self._stays, founder, model)
                while not founder.addrs:
                    await trio.lowlevel.checkpoint()
                await self._comes_back(list(founder.addrs))

    async def _stays(self, founder: AsyncPeer, model: nn.Module) -> None:
        async with founder:
            await self._round(founder, model, 0, 1)
            await self._is_back.wait()
            await self._round(founder, model, 0, 2)

    async def _comes_back(self, bootstrap: list[str]) -> None:
        model = self._make(1)
        async with self._peer(1, model, bootstrap) as peer:
            await self._round(peer, model, 1, 1)
        again = self._make(1)  # what the program always builds, and then what it saved itself
        again.load_state_dict(self.merged[1, 1])
        async with self._peer(1, again, bootstrap) as peer:
            assert_same(again.state_dict(), self.merged[1, 1])
            self._is_back.set()
            await self._round(peer, again, 1, 2)

    async def _round(self, peer: AsyncPeer, model: nn.Module, place: int, round: int) -> None:
        await trio.to_thread.run_sync(train, model, 10 * place + round)
        self.trained[place, round] = state_of(model)
        self.reports[place, round] = await peer.exchange(num_samples=SAMPLES[place])
        self.merged[place, round] = state_of(model)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def files_hold(folder: Path, tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes are in any file of a peer's state directory."""
    wanted = tensor.numpy().tobytes()
    return any(wanted in file.read_bytes() for file in folder.rglob("*") if file.is_file())


CASES: dict[str, tuple[Make, dict[str, Any], Callable[[str], bool]]] = {
    "adapters": (adapted, {"include": ["*lora_*"]}, lambda name: "lora_" in name),
    "heads": (Personal, {"exclude": ["head.*"]}, lambda name: not name.startswith("head.")),
}


@pytest.mark.parametrize("case", CASES)
async def test_what_is_left_out_stays_here_bit_for_bit(case: str, tmp_path: Path) -> None:
    make, chunk, is_exchanged = CASES[case]
    run = Run(make, chunk, tmp_path)
    await run.play()
    shared = [name for name in run.merged[0, 1] if is_exchanged(name)]
    private = [name for name in run.merged[0, 1] if not is_exchanged(name)]
    assert shared
    assert private
    for round in (1, 2):
        assert {run.reports[place, round].completeness for place in (0, 1)} == {1.0}
        for name in shared:
            ours, theirs = (run.trained[place, round][name] for place in (0, 1))
            merged = run.merged[0, round][name]
            assert torch.equal(merged, run.merged[1, round][name])
            if merged.is_floating_point():
                expected = (1 * ours.double() + 3 * theirs.double()) / 4
                torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)
        for place in (0, 1):
            for name in private:
                kept = run.trained[place, round][name]
                assert torch.equal(run.merged[place, round][name], kept)
    # Not that it only was not written back: it never left, and is on nobody's disk.
    for place in (0, 1):
        weight = max((run.trained[place, 2][name] for name in private), key=torch.numel)
        assert not any(files_hold(tmp_path / str(other), weight) for other in (0, 1))
    merged = run.merged[0, 2][shared[0]]
    assert all(files_hold(tmp_path / str(place), merged) for place in (0, 1))


async def test_adapters_alone_are_a_small_share_of_the_bytes(tmp_path: Path) -> None:
    run = Run(adapted, {"include": ["*lora_*"]}, tmp_path)
    await run.play()
    model = adapted(0)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    exchanged = describe(model, include=["*lora_*"]).nbytes
    assert exchanged < whole / 5
    assert run.reports[0, 2].bytes_payload < whole / 5
