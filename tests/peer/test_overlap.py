"""Rounds that are exchanged while the next one is trained, among real peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trio

from p2pfl_torrent.core.reports import RoundFinished, RoundStarted
from tests.peer.swarms import Member, all_done, swarm, until

ROUNDS = 4
OVERLAP = {"overlap": True, "total_round_num": ROUNDS}


def weights(member: Member) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in member.model.parameters()])


def progress(member: Member, round: int) -> torch.Tensor:
    """What ``Member`` adds to its weights in a round, whatever they are."""
    generator = torch.Generator().manual_seed(1000 * member.number + round)
    moved = [
        0.1 * torch.randn(weight.shape, generator=generator) for weight in member.model.parameters()
    ]
    return torch.cat([tensor.flatten().double() for tensor in moved])


def finished_alike(members: list[Member]) -> None:
    """Each member was told of every round once, in order, and all of the same aggregates."""
    told = [[event.report for event in member.told(RoundFinished)] for member in members]
    for reports in told:
        assert [report.round for report in reports] == list(range(1, ROUNDS + 1))
    for of_round in zip(*told, strict=True):
        assert len({report.model_hash for report in of_round}) == 1
        assert {report.agreement for report in of_round} == {1.0}


async def test_each_call_gives_the_round_before_and_the_last_call_the_end() -> None:
    async with swarm(3, federate=OVERLAP) as members:
        await all_done(members)
    finished_alike(members)
    for member in members:
        returned = [(report.round, report.closed_by) for report in member.reports]
        assert returned == [
            (1, "underway"),
            (1, "complete"),
            (2, "complete"),
            (4, "complete"),
        ]
        assert torch.equal(weights(member), weights(members[0]))
        assert member.reports[-1].next_round == ROUNDS + 1


async def test_a_peer_trains_on_from_the_aggregate_with_its_own_progress_since() -> None:
    begun: dict[tuple[int, int], torch.Tensor] = {}  # before training, by member and round

    async def before_exchange(member: Member, round: int) -> None:
        begun[member.number, round] = weights(member) - progress(member, round)

    async with swarm(3, before_exchange=before_exchange, federate=OVERLAP) as members:
        await all_done(members)
    total = sum(member.num_samples for member in members)

    def mean(of: dict[int, torch.Tensor]) -> torch.Tensor:
        return sum(m.num_samples * of[m.number] for m in members) / total  # type: ignore[return-value]

    expected = begun[1, 1]  # the aggregate after round 0: the common start
    own: dict[int, torch.Tensor] = {}
    for round in range(1, ROUNDS + 1):
        for member in members:
            # Round 1 and 2 are trained from the common start and from the peer's own round 1; from
            # then on the start is the aggregate of two rounds before plus a round's own progress.
            start = begun[member.number, round]
            assert torch.allclose(start, own.get(member.number, expected), atol=1e-5)
            own[member.number] = expected + progress(member, round)
        expected = mean(own)
    for member in members:
        assert torch.allclose(weights(member), expected, atol=1e-5)


async def test_a_slow_trainer_holds_up_no_exchange() -> None:
    """Round 1 closes at all, the slow one included, while that one still trains round 2."""

    async def before_exchange(member: Member, round: int) -> None:
        if (member.number, round) == (1, 2):
            await until(lambda: all(has_begun(each, 2) for each in members))
            assert not member.told(RoundFinished)  # its model does not hold the aggregate yet

    async with swarm(3, before_exchange=before_exchange, federate=OVERLAP) as members:
        await all_done(members)
    finished_alike(members)


def has_begun(member: Member, round: int) -> bool:
    return any(event.round == round for event in member.told(RoundStarted))


async def test_who_trains_past_the_deadline_catches_up_and_counts_late() -> None:
    async def before_exchange(member: Member, round: int) -> None:
        if (member.number, round) == (1, 2):  # the others close 2 without it, and publish 3
            await until(lambda: all(has_begun(each, 3) for each in members[1:]))

    async with swarm(
        3,
        before_exchange=before_exchange,
        federate={**OVERLAP, "total_round_num": 5},
        bittorrent={"timeout": 3.0},
    ) as members:
        await all_done(members)
    slow, *others = members
    late = [report for report in slow.reports if report.late]
    assert [report.round for report in late] == [2]
    counted = [
        owner
        for event in others[0].told(RoundFinished)
        for owner in event.report.owners
        if owner.owner == slow.id and owner.status == "late"
    ]
    assert [owner.trained_round for owner in counted] == [2]
    last = {member.told(RoundFinished)[-1].report.model_hash for member in members}
    assert len(last) == 1
    for member in others:
        assert torch.equal(weights(member), weights(slow))


@pytest.mark.parametrize(("round", "held"), [(2, 1), (ROUNDS, ROUNDS)])
async def test_a_cancelled_call_may_be_repeated(round: int, held: int) -> None:
    """Cancelled while it waits for a round to end: for the one before, or for the last."""
    cancelled: list[int] = []

    async def before_exchange(member: Member, now: int) -> None:
        if member.number == 2 and now == held:
            await until(lambda: bool(cancelled))
        elif member.number == 1 and now == round:
            with trio.CancelScope() as scope:
                member.node._nursery.start_soon(cancel_while_waiting, member, scope)
                await member.peer.exchange(num_samples=member.num_samples)
            assert scope.cancelled_caught
            cancelled.append(now)

    async def cancel_while_waiting(member: Member, scope: trio.CancelScope) -> None:
        rounds = member.node._rounds
        waiting = (True, held, "exchanging")
        await until(lambda: (rounds._is_called, rounds.round, rounds.phase) == waiting)
        scope.cancel()

    async with swarm(2, before_exchange=before_exchange, federate=OVERLAP) as members:
        await all_done(members)
    finished_alike(members)


async def test_a_failure_in_the_background_is_raised_by_the_next_call() -> None:
    failures = [OSError("no space left")]

    async def before_exchange(member: Member, round: int) -> None:
        if member.number != 1:
            return
        if round == 1:
            fail_once(member, failures)
        if round == 2:
            await until(lambda: not failures)

    async with swarm(2, before_exchange=before_exchange, federate=OVERLAP) as members:
        await all_done(members)
    assert not failures
    finished_alike(members)


def fail_once(member: Member, failures: list[OSError]) -> None:
    rounds: Any = member.node._rounds
    original = rounds._average

    def average(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args)

    rounds._average = average
