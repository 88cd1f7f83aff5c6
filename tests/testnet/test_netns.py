"""Namespaces with shaped links: made, reached, limited and removed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from testnet import netns
from testnet.netns import Link, NetworkError, carried, check, links, remove_stale, shape

try:
    check()
    REASON = ""
except NetworkError as error:
    REASON = str(error)
needs_netns = pytest.mark.skipif(bool(REASON), reason=REASON)


def ours() -> list[str]:
    """Namespaces of this very process."""
    return [name for name in netns._namespaces() if name.startswith(f"p2pfl-{os.getpid()}-")]


@pytest.mark.netns
@needs_netns
def test_places_reach_each_other_and_are_gone_afterwards() -> None:
    serve = textwrap.dedent(
        """
        import socket, sys
        server = socket.create_server((sys.argv[1], 7001))
        print(flush=True)
        server.accept()[0].recv(1)
        print(flush=True)
        sys.stdin.read()
        """
    )
    with links([Link(1e6, 1e6), Link()]) as (one, other):
        assert len(ours()) == 3
        command = [*one.enter, sys.executable, "-c", serve, one.address]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as server:
            assert server.stdout is not None
            server.stdout.readline()
            up, down = carried(server.pid)
            dial = f"import socket; socket.create_connection(({one.address!r}, 7001), 10)"
            subprocess.run([*other.enter, sys.executable, "-c", dial], check=True, timeout=30)
            server.stdout.readline()
            assert carried(server.pid)[0] > up
            assert carried(server.pid)[1] > down
            server.communicate(timeout=30)
        with pytest.raises(NetworkError, match="is in no place"):
            carried(server.pid)
    assert not ours()


@pytest.mark.netns
@needs_netns
def test_a_crash_inside_leaves_nothing_and_ends_what_runs_there() -> None:
    with pytest.raises(ZeroDivisionError), links([Link()]) as (place,):
        command = [*place.enter, sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        raise ZeroDivisionError
    assert child.wait(30) != 0
    assert child.stdin is not None
    child.stdin.close()
    assert not ours()


@pytest.mark.netns
@needs_netns
def test_what_a_killed_process_left_is_removed() -> None:
    program = textwrap.dedent(
        """
        import os, signal
        from testnet.netns import Link, links
        with links([Link()]):
            print(os.getpid(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    prefix = f"p2pfl-{int(done.stdout)}-"
    assert any(name.startswith(prefix) for name in netns._namespaces())
    with links([Link()]):
        remove_stale()  # not what a living one has
        assert len(ours()) == 2
    assert not any(name.startswith(prefix) for name in netns._namespaces())


def test_without_root_it_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="only root can make"), links([Link()]):
        pass


def test_without_iproute2_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(NetworkError, match="ip and tc: install iproute2"), links([Link()]):
        pass


def test_a_queue_holds_a_quarter_of_a_second_and_a_first_flight_at_least() -> None:
    assert shape("eth0", None) == []
    assert "bfifo limit 32768" in shape("eth0", 128e3)[2]
    assert "bfifo limit 625000" in shape("eth0", 20e6)[2]
    assert "rate 128000 ceil 128000 burst 1600" in shape("eth0", 128e3)[1]
    assert "burst 125000" in shape("eth0", 1e9)[1]
