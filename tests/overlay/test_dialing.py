"""Which address wins, on trio's own clock: nothing here touches a network."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from p2pfl_torrent.overlay.dialing import MAX_ADDRESSES, STAGGER, DialError, first_to_answer


class Addresses:
    """Addresses written as ``"0.1 ok"``: seconds until the answer, and which."""

    def __init__(self) -> None:
        self.tried: list[tuple[float, str]] = []
        self.reached: list[str] = []

    async def __call__(self, address: str) -> None:
        self.tried.append((round(trio.current_time(), 3), address))
        seconds, answer = address.split()
        await trio.sleep(float(seconds))
        if answer != "ok":
            raise DialError(f"{answer} after {seconds} s")
        self.reached.append(address)


@pytest.mark.parametrize(
    ("addresses", "reached", "seconds"),
    [
        (["0.1 ok", "0.1 ok"], ["0.1 ok"], 0.1),
        (["0.1 no", "0.1 ok"], ["0.1 ok"], 0.2),  # a failure makes room at once
        (["9 ok", "0.1 ok"], ["0.1 ok"], STAGGER + 0.1),  # a slow one does not hold up the next
        (["9 no", "9 no", "0.1 ok"], ["0.1 ok"], 2 * STAGGER + 0.1),
    ],
)
async def test_the_first_to_answer_wins(
    addresses: list[str], reached: list[str], seconds: float, autojump_clock: MockClock
) -> None:
    attempts = Addresses()
    assert await first_to_answer(addresses, attempts) is None
    assert attempts.reached == reached
    assert trio.current_time() == pytest.approx(seconds)


async def test_all_failures_are_told(autojump_clock: MockClock) -> None:
    failures = await first_to_answer(["0.3 refused", "0.1 unreachable"], Addresses())
    assert failures == ["refused after 0.3 s", "unreachable after 0.1 s"]


async def test_somebody_stops_trying(autojump_clock: MockClock) -> None:
    attempts = Addresses()
    failures = await first_to_answer(["0 no"] * 1000, attempts)
    assert len(attempts.tried) == MAX_ADDRESSES
    assert failures is not None
    assert len(failures) == MAX_ADDRESSES
