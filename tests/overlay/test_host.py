"""Hosts on the loopback interface: finding, losing and limiting each other."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import trio
from libp2p.peer.id import ID

from p2pfl_torrent.overlay.dialing import DialError
from p2pfl_torrent.overlay.host import Host, HostError, open_host
from p2pfl_torrent.overlay.identity import Identity
from p2pfl_torrent.overlay.limits import HostLimits
from p2pfl_torrent.overlay.stream import EndOfStream, Stream, StreamBroken
from tests.overlay.hosts import ECHO, LOOPBACK, PATIENCE, a_host, a_pair, ask_echo, echo, until

IDENTIFY = "/ipfs/id/1.0.0"
GENEROUS = HostLimits(accepts_per_second=1e6, accept_burst=10**6)


def tcp_port(host: Host) -> int:
    return int(host.addrs()[0].split("/")[4])


async def free_port() -> int:
    async with a_host() as host:
        return tcp_port(host)


async def test_an_echo() -> None:
    async with a_pair() as (ours, theirs):
        assert ours.connected() == {theirs.peer_id}
        await until(lambda: theirs.connected() == {ours.peer_id})
        assert await ask_echo(ours, theirs.peer_id, b"hello") == b"hello"


async def test_streams_go_both_ways_over_one_connection() -> None:
    async with a_pair() as (ours, theirs):
        ours.set_handler(ECHO, echo)
        await until(lambda: theirs.connected() == {ours.peer_id})
        assert await ask_echo(theirs, ours.peer_id, b"and back") == b"and back"


async def test_the_addresses_are_complete() -> None:
    async with a_host() as host:
        (address,) = host.addrs()
        assert address == f"/ip4/127.0.0.1/tcp/{tcp_port(host)}/p2p/{host.peer_id}"
        assert tcp_port(host) > 0


async def test_a_wildcard_is_shown_as_addresses_that_can_be_dialled() -> None:
    async with (
        open_host(Identity.ephemeral(), ["/ip4/0.0.0.0/tcp/0"]) as host,
        a_host() as other,
    ):
        assert not any("0.0.0.0" in address for address in host.addrs())
        local = [address for address in host.addrs() if "/127.0.0.1/" in address]
        await other.connect(host.peer_id, local, PATIENCE)
        assert other.connected() == {host.peer_id}


async def test_a_host_that_does_not_listen_can_dial() -> None:
    async with a_host() as host, open_host(Identity.ephemeral(), []) as shy:
        assert shy.addrs() == ()
        host.set_handler(ECHO, echo)
        await shy.connect(host.peer_id, host.addrs(), PATIENCE)
        assert await ask_echo(shy, host.peer_id, b"hi") == b"hi"


async def test_a_taken_port_is_one_sentence_and_leaves_nothing_behind() -> None:
    async with a_host() as host:
        port, free = tcp_port(host), await free_port()
        with pytest.raises(HostError) as caught:
            async with open_host(
                Identity.ephemeral(), [f"/ip4/127.0.0.1/tcp/{free}", f"/ip4/127.0.0.1/tcp/{port}"]
            ):
                raise AssertionError("two hosts on one port")
        assert str(caught.value) == (
            f"Port {port} on 127.0.0.1 is taken: listen on another (network.listen or --listen), "
            "or on 0 for any that is free."
        )
        async with open_host(Identity.ephemeral(), [f"/ip4/127.0.0.1/tcp/{free}"]) as second:
            assert tcp_port(second) == free


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("localhost:4001", "is not a multiaddress: write it like"),
        ("/ip4/127.0.0.1/udp/4001", "is not an IP address and a TCP port"),
        ("/ip4/127.0.0.1/tcp/0/ws", "is not an IP address and a TCP port"),
        ("/ip4/127.0.0.1/tcp/70000", "is not a multiaddress"),
        ("/ip4/192.0.2.1/tcp/4001", "Cannot listen on 192.0.2.1 port 4001"),
    ],
)
async def test_an_unusable_address_is_one_sentence(listen: str, says: str) -> None:
    with pytest.raises(HostError, match=says):
        async with open_host(Identity.ephemeral(), [listen]):
            raise AssertionError("listening there")


async def test_the_blocks_own_errors_come_out_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        async with a_host():
            raise ZeroDivisionError


async def test_cancelling_closes_everything() -> None:
    async with a_host() as theirs:
        port = await free_port()

        async def run_until_cancelled() -> None:
            async with open_host(Identity.ephemeral(), [f"/ip4/127.0.0.1/tcp/{port}"]) as ours:
                await ours.connect(theirs.peer_id, theirs.addrs(), PATIENCE)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_until_cancelled)
            await until(lambda: len(theirs.connected()) == 1)
            nursery.cancel_scope.cancel()
        await until(lambda: not theirs.connected())
        async with open_host(Identity.ephemeral(), [f"/ip4/127.0.0.1/tcp/{port}"]):
            pass


async def test_both_sides_are_told_of_the_others_coming_and_going() -> None:
    told: list[tuple[str, str]] = []

    def tell(what: str) -> Callable[[str], None]:
        return lambda peer: told.append((what, peer))

    def raises(peer: str) -> None:
        raise ZeroDivisionError("a bug in one callback must not cost the next one its call")

    async with a_host() as ours, a_host() as theirs:
        ours.on_connect(raises)
        ours.on_connect(tell("ours +"))
        ours.on_disconnect(tell("ours -"))
        theirs.on_connect(tell("theirs +"))
        theirs.on_disconnect(tell("theirs -"))
        await ours.connect(theirs.peer_id, theirs.addrs(), PATIENCE)
        await until(lambda: len(told) == 2)
        await ours.disconnect(theirs.peer_id)
        assert ours.connected() == set()
        await until(lambda: len(told) == 4)
    assert set(told[:2]) == {("ours +", theirs.peer_id), ("theirs +", ours.peer_id)}
    assert set(told[2:]) == {("ours -", theirs.peer_id), ("theirs -", ours.peer_id)}


async def test_a_failed_dial_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    async with a_host() as ours:
        with pytest.raises(DialError):
            await ours.connect(
                Identity.ephemeral().peer_id, [f"/ip4/127.0.0.1/tcp/{await free_port()}"], PATIENCE
            )
    assert capfd.readouterr() == ("", "")


# Dialling


async def test_connecting_twice_makes_one_connection() -> None:
    async with a_host() as ours, a_host() as theirs:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ours.connect, theirs.peer_id, theirs.addrs(), PATIENCE)
        await ours.connect(theirs.peer_id, [], PATIENCE)
        assert len(ours.swarm.get_connections()) == 1


async def test_a_dead_address_does_not_hide_the_live_one() -> None:
    async with a_host() as ours, a_host() as theirs:
        dead = f"/ip4/127.0.0.1/tcp/{await free_port()}"
        nonsense = ["/ip4/127.0.0.1/udp/1", "no address", dead]
        await ours.connect(theirs.peer_id, [*nonsense, *theirs.addrs()], PATIENCE)
        assert ours.connected() == {theirs.peer_id}


async def test_redialling_after_a_failed_dial_works_at_once() -> None:
    identity, port = Identity.ephemeral(), await free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    async with a_host() as ours:
        for _ in range(3):
            with pytest.raises(DialError, match="Connection refused"):
                await ours.connect(identity.peer_id, [address], PATIENCE)
        async with open_host(identity, [address]) as theirs:
            await ours.connect(theirs.peer_id, [address], PATIENCE)
            assert ours.connected() == {theirs.peer_id}


async def test_another_peer_at_the_address_is_noticed() -> None:
    async with a_host() as ours, a_host() as impostor:
        expected = Identity.ephemeral().peer_id
        bare = impostor.addrs()[0].split("/p2p/")[0]
        with pytest.raises(
            DialError,
            match=f"{bare}/p2p/{expected}: the peer that answers there is {impostor.peer_id}",
        ):
            await ours.connect(expected, [bare], PATIENCE)
        with pytest.raises(DialError, match="is another peer's address"):
            await ours.connect(expected, impostor.addrs(), PATIENCE)
        assert ours.connected() == set()


async def test_a_silent_address_costs_the_timeout_and_no_more() -> None:
    async with a_host() as ours:
        (silent, *_) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with silent:
            port = silent.socket.getsockname()[1]
            with pytest.raises(DialError, match=r"did not answer within 0\.2 s"):
                await ours.connect(
                    Identity.ephemeral().peer_id, [f"/ip4/127.0.0.1/tcp/{port}"], timeout=0.2
                )


@pytest.mark.parametrize(
    "peer_id", ["", "nonsense", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]
)
async def test_what_is_no_ed25519_peer_is_not_dialled(peer_id: str) -> None:
    async with a_host() as ours:
        with pytest.raises(DialError, match="is not the id of an Ed25519 peer"):
            await ours.connect(peer_id, LOOPBACK, PATIENCE)


async def test_no_address_and_oneself_are_refused() -> None:
    async with a_host() as ours:
        with pytest.raises(DialError, match="no address of"):
            await ours.connect(Identity.ephemeral().peer_id, [], PATIENCE)
        with pytest.raises(DialError, match="is this peer itself"):
            await ours.connect(ours.peer_id, ours.addrs(), PATIENCE)


async def test_two_that_dial_each_other_at_once_can_talk_and_part() -> None:
    async with a_host() as one, a_host() as other:
        one.set_handler(ECHO, echo)
        other.set_handler(ECHO, echo)
        gone: list[str] = []
        one.on_disconnect(gone.append)
        other.on_disconnect(gone.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, other.peer_id, other.addrs(), PATIENCE)
            nursery.start_soon(other.connect, one.peer_id, one.addrs(), PATIENCE)
        assert one.connected() == {other.peer_id}
        assert other.connected() == {one.peer_id}
        assert await ask_echo(one, other.peer_id, b"a") == b"a"
        assert await ask_echo(other, one.peer_id, b"b") == b"b"
        await one.disconnect(other.peer_id)
        await until(lambda: not other.connected())
        await until(lambda: sorted(gone) == sorted([one.peer_id, other.peer_id]))
        assert one.swarm.get_connections() == other.swarm.get_connections() == []


async def test_opening_a_stream_dials_nobody() -> None:
    async with a_host() as ours, a_host() as theirs:
        ours.swarm.peerstore.add_addrs(
            ID.from_base58(theirs.peer_id), list(theirs.libp2p.get_addrs()), 60
        )
        with pytest.raises(StreamBroken, match="not connected to"):
            await ours.open_stream(theirs.peer_id, ECHO, PATIENCE)
        assert theirs.connected() == set()


async def test_a_protocol_that_is_not_spoken_is_said_so() -> None:
    async with a_pair() as (ours, theirs):
        with pytest.raises(StreamBroken, match="does not speak /flt/other/1"):
            await ours.open_stream(theirs.peer_id, "/flt/other/1", PATIENCE)
        theirs.remove_handler(ECHO)
        with pytest.raises(StreamBroken, match=f"does not speak {ECHO}"):
            await ours.open_stream(theirs.peer_id, ECHO, PATIENCE)


# Losing each other


KILLED = f"""
import trio
from tests.overlay.hosts import ECHO, a_host, echo
async def main():
    async with a_host() as host:
        host.set_handler({ECHO!r}, echo)
        print(host.peer_id, *host.addrs(), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_killed_peer_is_noticed_and_a_frozen_one_does_not_hold_us_up(sign: int) -> None:
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        async with a_host() as ours:
            assert process.stdout is not None
            line = await trio.to_thread.run_sync(process.stdout.readline)
            peer_id, *addrs = line.decode().split()
            gone: list[str] = []
            ours.on_disconnect(gone.append)
            await ours.connect(peer_id, addrs, PATIENCE)
            stream = await ours.open_stream(peer_id, ECHO, PATIENCE)
            assert await ask_echo(ours, peer_id, b"alive") == b"alive"
            process.send_signal(sign)
            if sign == signal.SIGKILL:
                with pytest.raises(StreamBroken, match=r"the connection to .* is gone"):
                    await stream.read_exactly(1, PATIENCE)
                await until(lambda: gone == [peer_id])
            else:
                with pytest.raises(StreamBroken, match=r"took too little within 0\.3 s"):
                    await stream.write(bytes(32 << 20), 0.3)
                with trio.fail_after(4):  # and neither does leaving
                    await ours.disconnect(peer_id)
                assert ours.connected() == set()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_a_stream_whose_connection_goes_breaks_on_both_sides() -> None:
    ends: list[str] = []

    async def waits(stream: Stream) -> None:
        try:
            await stream.read_exactly(1, PATIENCE)
        except EndOfStream:
            ends.append("end")
        except StreamBroken:
            ends.append("broken")

    async with a_pair() as (ours, theirs):
        theirs.set_handler("/flt/test/wait/1", waits)
        stream = await ours.open_stream(theirs.peer_id, "/flt/test/wait/1", PATIENCE)
        await ours.disconnect(theirs.peer_id)
        with pytest.raises(StreamBroken):
            await stream.read_exactly(1, PATIENCE)
        with pytest.raises(StreamBroken):
            await stream.write(b"x", PATIENCE)
        await until(lambda: ends == ["broken"])


async def test_three_hundred_connections_in_a_row_are_no_limit() -> None:
    dialers, rounds = 20, 16
    async with a_host(GENEROUS) as host:
        visits = 0

        async def come_and_go() -> None:
            nonlocal visits
            async with a_host() as visitor:
                for _ in range(rounds):
                    await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
                    visits += 1
                    await visitor.disconnect(host.peer_id)

        async with trio.open_nursery() as nursery:
            for _ in range(dialers):
                nursery.start_soon(come_and_go)
        await until(lambda: not host.connected())
        assert visits == dialers * rounds
        assert host.swarm._inbound_by_ip == {}
        assert host.swarm._handshaking == 0
        assert host.swarm._inbound_limiter.borrowed_tokens == 0
        assert len(host.swarm.peerstore.peer_ids()) == 1


# Limits


async def test_one_connection_too_many_is_refused_and_the_others_stay() -> None:
    async with a_host(HostLimits(connections=2)) as host:
        host.set_handler(ECHO, echo)
        async with a_host() as first, a_host() as second, a_host() as third:
            await first.connect(host.peer_id, host.addrs(), PATIENCE)
            await second.connect(host.peer_id, host.addrs(), PATIENCE)
            with pytest.raises(DialError, match="hangs up: it is no libp2p peer, or has no place"):
                await third.connect(host.peer_id, host.addrs(), PATIENCE)
            with pytest.raises(DialError, match="there are 2 connections already"):
                await host.connect(third.peer_id, third.addrs(), PATIENCE)
            assert await ask_echo(first, host.peer_id, b"1") == b"1"
            await second.disconnect(host.peer_id)
            await until(lambda: not host.swarm.full())
            await third.connect(host.peer_id, host.addrs(), PATIENCE)


async def test_an_address_has_its_share() -> None:
    async with a_host(HostLimits(connections_per_ip=1)) as host, a_host() as one, a_host() as two:
        await one.connect(host.peer_id, host.addrs(), PATIENCE)
        with pytest.raises(DialError):
            await two.connect(host.peer_id, host.addrs(), PATIENCE)


async def test_an_address_that_connects_too_often_must_wait() -> None:
    limits = HostLimits(accepts_per_second=0.001, accept_burst=2)
    async with a_host(limits) as host, a_host() as visitor:
        for _ in range(2):
            await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
            await visitor.disconnect(host.peer_id)
        with pytest.raises(DialError):
            await visitor.connect(host.peer_id, host.addrs(), PATIENCE)


async def test_a_peer_with_too_many_connections_loses_its_oldest() -> None:
    identity = Identity.ephemeral()
    async with a_host(HostLimits(connections_per_peer=2)) as host:
        host.set_handler(ECHO, echo)
        async with (
            open_host(identity, LOOPBACK) as one,
            open_host(identity, LOOPBACK) as two,
            open_host(identity, LOOPBACK) as three,
        ):
            for same_peer in (one, two, three):
                await same_peer.connect(host.peer_id, host.addrs(), PATIENCE)
                await until(lambda: host.connected() == {identity.peer_id})
            await until(lambda: one.connected() == set())
            assert await ask_echo(three, host.peer_id, b"newest") == b"newest"
            await until(lambda: len(host.swarm.get_connections()) == 2)


async def test_identify_is_answered_and_not_asked_for() -> None:
    async with a_host() as host, a_host() as visitor:
        asked: list[str] = []

        async def identify(stream: Stream) -> None:
            asked.append(stream.remote)

        host.set_handler(ECHO, echo)
        await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
        answer = await visitor.open_stream(host.peer_id, IDENTIFY, PATIENCE)
        assert await answer.read_exactly(10, PATIENCE)
        host.set_handler(IDENTIFY, identify)
        visitor.set_handler(IDENTIFY, identify)
        await visitor.disconnect(host.peer_id)
        await until(lambda: not host.connected())
        await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
        for _ in range(5):  # an answer on the connection comes after what was asked on it before
            await ask_echo(visitor, host.peer_id, b"x")
        assert asked == []


async def test_streams_above_the_limit_are_reset_and_room_is_made_again() -> None:
    limits = HostLimits(streams_per_peer=4, stream_burst=10**6, stream_opens_per_second=1e6)
    async with a_host(limits) as host, a_host() as visitor:
        host.set_handler(ECHO, echo)
        await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
        await until(lambda: host.connected() == {visitor.peer_id})
        held: list[Stream] = []
        with pytest.raises(StreamBroken, match="broke off the stream"):
            for _ in range(5):
                held.append(await visitor.open_stream(host.peer_id, ECHO, PATIENCE))
        assert len(held) == 4
        for stream in held:
            await stream.reset()

        async def served() -> bool:
            try:
                return await ask_echo(visitor, host.peer_id, b"again") == b"again"
            except StreamBroken:
                return False

        with trio.fail_after(PATIENCE):
            while not await served():
                pass


async def test_streams_opened_too_fast_are_reset() -> None:
    limits = HostLimits(stream_burst=5, stream_opens_per_second=0.001)
    async with a_host(limits) as host, a_host() as visitor:
        host.set_handler(ECHO, echo)
        await visitor.connect(host.peer_id, host.addrs(), PATIENCE)
        with pytest.raises(StreamBroken, match="broke off the stream"):
            for _ in range(6):
                await ask_echo(visitor, host.peer_id, b"x")
