from __future__ import annotations

import io
import threading

import pytest

from p2pfl_torrent.cli.following import Following
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.reports import Joined, Left, PeerEvent
from p2pfl_torrent.progress.display import Display, console_for
from p2pfl_torrent.progress.state import SwarmState

ME = PeerId("12D3KooWme")


class Source:
    """Hands out what was put in, and tells when it was asked."""

    def __init__(self) -> None:
        self.waiting: list[PeerEvent] = []
        self.asked = threading.Event()

    def drain(self) -> list[PeerEvent]:
        found, self.waiting = self.waiting, []
        self.asked.set()
        return found


def following(stream: io.StringIO, source: Source) -> Following:
    swarm = SwarmState("digits", "mesh", 2, ["part 1/2"])
    return Following(Display(swarm, console_for(stream)), "part 1/2", source, lambda: None)


def test_events_are_told_while_the_block_runs_and_at_its_end() -> None:
    stream, source = io.StringIO(), Source()
    source.waiting.append(Joined("ab" * 32, ME, 0, 1))
    with following(stream, source):
        assert source.asked.wait(10)
        source.waiting.append(Left("finished"))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "part 1/2: joined swarm abababab with 1 members as 12D3KooWme",
        "part 1/2: left: finished",
    ]


def test_what_went_wrong_is_left_to_whoever_catches_it() -> None:
    stream, source = io.StringIO(), Source()
    source.waiting.append(Left("The disk is full."))
    display = Display(SwarmState("digits", "mesh", 2, ["part 1/2"]), console_for(stream))
    with Following(display, "part 1/2", source, lambda: None):
        pass
    assert stream.getvalue() == ""
    assert display.swarm.peers["part 1/2"].phase == "left"


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_is_gone_shows_at_the_end_and_not_before() -> None:
    source = Source()
    source.waiting.append(Left("finished"))
    reached = False
    with pytest.raises(BrokenPipeError), following(Gone(), source):
        assert source.asked.wait(10)
        reached = True
    assert reached


def test_an_error_inside_the_block_goes_before_one_of_the_view() -> None:
    source = Source()
    source.waiting.append(Left("finished"))
    with pytest.raises(KeyboardInterrupt), following(Gone(), source):
        raise KeyboardInterrupt
