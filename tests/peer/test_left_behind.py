"""A member that stood still for several rounds, which nobody's deadline would have ended soon."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.peer.processes import bootstrap_node, swarm
from tests.peer.test_kill import gather, one_round, sections, the_same

pytestmark = pytest.mark.slow
ROUNDS_AWAY = (2, 3, 4)
BACK = 5


@pytest.mark.timeout(300)
def test_a_member_stopped_for_several_rounds_catches_up_and_holds_up_nobody(tmp_path: Path) -> None:
    setup = sections(3, BACK + 2, type="full")
    setup["federate"]["train_timeout"] = 3600.0
    setup["bittorrent"]["timeout"] = 600.0
    with bootstrap_node() as (_, address), swarm(tmp_path, setup) as fleet:
        *others, stopped = members = gather(fleet, address, 3)
        one_round(members, 1)
        stopped.wait_for("RoundStarted", round=2)
        stopped.process.send_signal(signal.SIGSTOP)
        for round in ROUNDS_AWAY:
            reports = one_round(others, round)
        stopped.process.send_signal(signal.SIGCONT)
        for member in others:
            member.wait_for("MemberChanged", member=stopped.peer_id, change="returned")
            member.go()
        stopped.go()
        report = stopped.report(2)
        assert (report["closed_by"], report["next_round"]) == ("late", BACK)
        assert report["model_hash"] == reports[0]["model_hash"]
        stopped.go()
        for member in members:
            assert member.report(BACK)["closed_by"] == "complete"
        # Nobody waits for it in the round it enters, so its update of that may count there or in
        # the next; the round after that is the first in which all must count the same.
        for round in (BACK + 1, BACK + 2):
            reports = one_round(members, round)
            assert {report["closed_by"] for report in reports} == {"complete"}
        assert the_same(reports)
