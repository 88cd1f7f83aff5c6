"""What a training loop and the network take from each other.

    python -m benchmarks training --megabytes 150 --json -

A small CNN trains on one thread of torch, while another peer's update arrives at a paced 50 MB/s
and is checked and stored: with the network in a thread of the training process, which is what
`Peer` does, and with the network in a process of its own. The sender is one more process. A window
runs from the update's manifest to its last chunk. Training inside is compared with the same loop's
in the seconds before and after, and the window's length with that of the update before, which came
while nothing was trained. The result is the median over the repeats, both networks interleaved.

Where others use the same cores, that hits training in and around the window by chance. So the ratio
of training is also given without the seconds in which its thread was ready to run and had no core
(``training_ratio_on_core``): what is left is its own work, and waiting for Python's lock. That
leaves out what the network takes by using a core, which is nothing where one is free.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.fleet import Process
from benchmarks.member import Spec
from benchmarks.output import add_json, median, write

LEAD = 2.0  # seconds of training before and after an update comes, to compare with

Window = tuple[float, float]
Batch = Sequence[float]  # when it was done, and seconds waited for a core until then


@dataclass(frozen=True, slots=True)
class Sharing:
    """One update with, and one without training beside it.

    Attributes:
        batches_alone, batches_beside: per second.
        on_core_alone, on_core_beside: per second in which the loop did not wait for a core.
        seconds_alone, seconds_beside: in which the update arrived.
        megabytes_alone: per second, as it arrived without training.
        cpu_seconds_alone: of the receiving process in that time.
    """

    batches_alone: float
    batches_beside: float
    on_core_alone: float
    on_core_beside: float
    seconds_alone: float
    seconds_beside: float
    megabytes_alone: float
    cpu_seconds_alone: float

    @property
    def training_ratio(self) -> float:
        """Throughput of the training beside the exchange, over that alone."""
        return self.batches_beside / self.batches_alone

    @property
    def training_ratio_on_core(self) -> float:
        """The same, of the time in which the loop did not wait for a core."""
        return self.on_core_beside / self.on_core_alone

    @property
    def exchange_ratio(self) -> float:
        """Seconds of the exchange beside training, over those alone."""
        return self.seconds_beside / self.seconds_alone


def rates(batches: Sequence[Batch], windows: Sequence[Window]) -> tuple[float, float]:
    """Batches a second inside some windows, from the first to the last in each: of all the time,
    and of that in which the loop did not wait for a core.

    Raises:
        ValueError: there are too few: nothing was trained meanwhile.
    """
    done = 0
    seconds = waited = 0.0
    for began, ended in windows:
        inside = [batch for batch in batches if began <= batch[0] <= ended]
        if len(inside) > 1:
            done += len(inside) - 1
            seconds += inside[-1][0] - inside[0][0]
            waited += inside[-1][1] - inside[0][1]
    if not done:
        raise ValueError("no batch was done in the window: the update is too small")
    return done / seconds, done / (seconds - waited)


@dataclass(frozen=True, slots=True)
class Transfer:
    """An update that came.

    Attributes:
        batches: those trained meanwhile, before and after.
        shared_at: when the sender was told to share.
    """

    window: Window
    cpu_seconds: float
    batches: Sequence[Batch]
    shared_at: float

    @property
    def seconds(self) -> float:
        return self.window[1] - self.window[0]


def sharing(megabytes: float, quiet: Transfer, busy: Transfer) -> Sharing:
    """The figures of an update without and of one with training beside it."""
    around = [(busy.batches[0][0], busy.shared_at), (busy.window[1], busy.batches[-1][0])]
    alone, on_core_alone = rates(busy.batches, around)
    beside, on_core_beside = rates(busy.batches, [busy.window])
    return Sharing(
        batches_alone=alone,
        batches_beside=beside,
        on_core_alone=on_core_alone,
        on_core_beside=on_core_beside,
        seconds_alone=quiet.seconds,
        seconds_beside=busy.seconds,
        megabytes_alone=megabytes / quiet.seconds,
        cpu_seconds_alone=quiet.cpu_seconds,
    )


class Network(Protocol):
    """A sender, and whoever receives what it sends."""

    def transfer(self, *, trains: bool) -> Transfer:
        """One update, and one back."""
        ...


class InThread:
    """The network in a thread of the training process."""

    def __init__(self, sender: Process, program: Process) -> None:
        self._sender, self._program = sender, program

    def transfer(self, *, trains: bool) -> Transfer:
        self._program.say("take train" if trains else "take wait")
        self._program.hear("taking")
        shared_at = time.monotonic()
        self._sender.say("share")
        answer = self._program.hear("window")
        _share_back(self._program, self._sender)
        return _transfer(answer, answer["batches"], shared_at)


class InProcess:
    """The network in a process of its own."""

    def __init__(self, sender: Process, receiver: Process, program: Process) -> None:
        self._sender, self._receiver, self._program = sender, receiver, program

    def transfer(self, *, trains: bool) -> Transfer:
        if trains:
            self._program.say("train")
            self._program.hear("training")
            time.sleep(LEAD)
        self._receiver.say("take")
        self._receiver.hear("taking")
        shared_at = time.monotonic()
        self._sender.say("share")
        answer = self._receiver.hear("window")
        batches: Sequence[Batch] = ()
        if trains:
            time.sleep(LEAD)
            self._program.say("enough")
            batches = self._program.hear("batches")["batches"]
        _share_back(self._receiver, self._sender)
        return _transfer(answer, batches, shared_at)


def _share_back(receiver: Process, sender: Process) -> None:
    """End the round that a transfer belongs to."""
    receiver.say("on")
    receiver.hear("shared")
    sender.hear("shared")


def _transfer(answer: dict[str, Any], batches: Sequence[Batch], shared_at: float) -> Transfer:
    began, ended = answer["window"]
    return Transfer((began, ended), answer["cpu_seconds"], batches, shared_at)


class Bench:
    """Starts processes and ends them."""

    def __init__(self, megabytes: float, pace: float, rounds: int, directory: Path) -> None:
        self._megabytes = megabytes
        self._pace = int(pace * 1e6)
        self._rounds = rounds
        self._directory = directory
        self._stack = ExitStack()

    def _spec(self, place: int, entry: Sequence[str]) -> Spec:
        config: dict[str, object] = {
            "federate": {"client_num": 2, "total_round_num": self._rounds, "join_timeout": 300.0},
            "bittorrent": {"timeout": 600.0, "linger": 0.0},
            # One end of it has torch, which reads the architecture, and the other has not.
            "chunk": {"include": ["layer*"], "architecture": "uniform"},
            "network": {"bootstrap": list(entry)},
        }
        return Spec(config, place, self._megabytes)

    def _start(self, name: str, module: str, spec: Spec, *arguments: str) -> Process:
        file = self._directory / f"{name}.json"
        file.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        errors = self._stack.enter_context((self._directory / f"{name}.err").open("w+b"))
        process = Process(name, ["-m", f"benchmarks.{module}", str(file), *arguments], errors)
        self._stack.callback(process.end)
        return process

    def in_thread(self) -> InThread:
        sender = self._start("sender-1", "training_node", self._spec(0, ()), str(self._pace))
        spec = self._spec(1, [sender.hear("address")["address"]])
        program = self._start("program-1", "training_loop", spec)
        program.hear("up")
        program.say("join")
        for process in (program, sender):
            process.hear("ready")
        return InThread(sender, program)

    def in_process(self) -> InProcess:
        sender = self._start("sender-2", "training_node", self._spec(0, ()), str(self._pace))
        spec = self._spec(1, [sender.hear("address")["address"]])
        receiver = self._start("receiver-2", "training_node", spec, "0")
        program = self._start("program-2", "training_loop", spec)
        program.hear("up")
        for process in (receiver, sender):
            process.hear("ready")
        return InProcess(sender, receiver, program)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def bench(megabytes: float, pace: float, rounds: int) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="p2pfl-benchmark-") as directory:
        opened = Bench(megabytes, pace, rounds, Path(directory))
        try:
            yield opened
        finally:
            opened.close()


def measure(megabytes: float, pace: float, repeats: int) -> dict[str, list[Sharing]]:
    """So many repeats of each network, interleaved."""
    with bench(megabytes, pace, 2 * repeats + 1) as opened:
        networks: dict[str, Network] = {
            "thread": opened.in_thread(),
            "process": opened.in_process(),
        }
        runs: dict[str, list[Sharing]] = {name: [] for name in networks}
        for _ in range(repeats):
            for name, network in networks.items():
                quiet = network.transfer(trains=False)
                busy = network.transfer(trains=True)
                runs[name].append(sharing(megabytes, quiet, busy))
        return runs


RATIOS = ("training_ratio", "training_ratio_on_core", "exchange_ratio")


def summary(runs: Sequence[Sharing]) -> dict[str, object]:
    """Medians, those of the repeats' ratios first; and the repeats."""
    rows = [{**{name: getattr(run, name) for name in RATIOS}, **asdict(run)} for run in runs]
    medians: dict[str, object] = {name: median([row[name] for row in rows]) for name in rows[0]}
    return {**medians, "runs": rows}


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training",
        description="What a training loop and the network take from each other.",
    )
    parser.add_argument("--megabytes", type=float, default=150.0, metavar="M", help="of an update")
    parser.add_argument("--pace", type=float, default=50.0, metavar="M", help="megabytes a second")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    add_json(parser)
    args = parser.parse_args(argv)
    runs = measure(args.megabytes, args.pace, args.repeats)
    result = {network: summary(each) for network, each in runs.items()}
    table = [f"{'network in a':24}" + "".join(f"{network:>9}" for network in result)]
    for name in result["thread"]:
        if name != "runs":
            table.append(f"{name:24}" + "".join(f"{each[name]:9.2f}" for each in result.values()))
    what: dict[str, object] = {"megabytes": args.megabytes, "pace": args.pace}
    write(args.json, {**what, **result}, table)
    return 0
