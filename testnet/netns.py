"""Network namespaces with shaped links: each place has an address, and a rate up and down.

    with links([Link(up=5e6, down=20e6), Link(up=1e8, down=1e9)]) as places:
        subprocess.run([*places[0].enter, "ip", "address"])

Needs root and iproute2. Every place is a namespace whose one interface leads to a bridge in a
namespace of its own, so nothing of the machine's network is touched and no address can collide.
Rates are htb classes on both ends of that wire, set from outside. All of it is gone at the end;
what a killed process left is removed when the next begins.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

SUBNET = IPv4Network("198.18.0.0/16")  # of 198.18.0.0/15, set aside for benchmarks (RFC 2544)
PREFIX = "p2pfl"  # of our namespaces: p2pfl-<pid>-<start of that process>-<what>
OURS = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\w+")
INTERFACE = "eth0"
QUEUE_SECONDS = 0.25  # of its rate that a link's queue holds: more is delay, less costs throughput
LEAST_QUEUE = 32 << 10  # bytes: two unsplit packets of TCP's first flight
CONGESTION = "reno"
"""TCP's control of congestion, which every kernel lets a namespace choose. It matters: bbr sends no
more than twice what fits the shortest round trip, which without added delay is next to nothing, and
starves while the way back is queued up."""

COMMAND_SECONDS = 30.0


class NetworkError(Exception):
    """Namespaces cannot be made here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a place can send and receive, in bit/s on the wire; None is unlimited."""

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace with a link.

    Attributes:
        name: of the namespace.
        address: IPv4, reachable from all other places.
    """

    name: str
    address: str
    link: Link

    @property
    def enter(self) -> tuple[str, ...]:
        """Words before a command that make it run here."""
        return ("ip", "netns", "exec", self.name)


def carried(pid: int) -> tuple[int, int]:
    """Bytes that the link of a process's place has carried so far, up and down.

    Raises:
        NetworkError: it is in none, or has ended.
    """
    try:
        table = Path(f"/proc/{pid}/net/dev").read_text()
    except OSError:
        table = ""
    for line in table.splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == INTERFACE:
            numbers = counters.split()
            return int(numbers[8]), int(numbers[0])
    raise NetworkError(f"process {pid} is in no place with a link")


@contextmanager
def links(wanted: Sequence[Link]) -> Iterator[list[Place]]:
    """A place for each link, in order; gone after the block, whatever runs in them too.

    Raises:
        NetworkError: this process may not make namespaces, or lacks the tools.
    """
    check()
    remove_stale()
    run = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}"
    hosts = SUBNET.hosts()
    places = [
        Place(f"{run}-{number}", str(next(hosts)), link) for number, link in enumerate(wanted)
    ]
    try:
        switch = f"{run}-switch"
        _build(switch, places)
        yield places
    finally:
        _remove([name for name in _namespaces() if name.startswith(f"{run}-")])


def check() -> None:
    """Raises NetworkError where no namespaces can be made."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NetworkError(
            f"Shaped links need {' and '.join(missing)}: install iproute2 and try again."
        )
    if os.geteuid() != 0:
        raise NetworkError("Shaped links need network namespaces, which only root can make.")
    try:
        _run("unshare", "--net", "true")
    except NetworkError as error:
        raise NetworkError(
            "This machine does not let root make network namespaces (a container without "
            f"CAP_SYS_ADMIN?): {error}"
        ) from error


def remove_stale() -> None:
    """Remove what processes left that are no more."""
    for name in _namespaces():
        ours = OURS.fullmatch(name)
        if ours is not None and _started(int(ours[1])) != int(ours[2]):
            _remove([name])


def _build(switch: str, places: Sequence[Place]) -> None:
    for name in (switch, *(place.name for place in places)):
        _run("ip", "netns", "add", name)
    wires = ["link add bridge type bridge", "link set bridge up"]
    for number, place in enumerate(places):
        wire = f"wire{number}"
        wires += [
            f"link add {wire} type veth peer name {INTERFACE} netns {place.name}",
            f"link set {wire} master bridge up",
        ]
    _batch("ip", switch, wires)
    for number, place in enumerate(places):
        _batch(
            "ip",
            place.name,
            [
                "link set lo up",
                f"address add {place.address}/{SUBNET.prefixlen} dev {INTERFACE}",
                f"link set {INTERFACE} up",
            ],
        )
        _control_congestion(place)
        _batch("tc", place.name, shape(INTERFACE, place.link.up))
        _batch("tc", switch, shape(f"wire{number}", place.link.down))


def shape(device: str, rate: float | None) -> list[str]:
    """tc commands that limit what leaves a device to a rate in bit/s."""
    if rate is None:
        return []
    burst = round(min(125_000, max(1_600, rate / 8 * 0.001)))  # a millisecond, a packet at least
    queue = round(max(LEAST_QUEUE, rate / 8 * QUEUE_SECONDS))
    limit = f"rate {rate:.0f} ceil {rate:.0f} burst {burst} cburst {burst} quantum 1514"
    return [
        f"qdisc add dev {device} root handle 1: htb default 10",
        f"class add dev {device} parent 1: classid 1:10 htb {limit}",
        f"qdisc add dev {device} parent 1:10 handle 10: bfifo limit {queue}",
    ]


def _control_congestion(place: Place) -> None:
    _run(*place.enter, "sysctl", "-q", "-w", f"net.ipv4.tcp_congestion_control={CONGESTION}")


def _remove(names: Sequence[str]) -> None:
    for name in names:
        for pid in _run("ip", "netns", "pids", name).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself
        _run("ip", "netns", "delete", name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks: ids are used again. None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _batch(tool: str, namespace: str, commands: Sequence[str]) -> None:
    if commands:
        _run(tool, "-n", namespace, "-batch", "-", said="\n".join(commands) + "\n")


def _run(*command: str, said: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            input=said,
            stdin=None if said is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"`{' '.join(command)}` failed: {error}") from error
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
