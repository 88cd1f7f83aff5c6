from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from p2pfl_torrent.core.phases import PhaseMachine


def test_a_flat_loss_is_late_and_a_falling_one_early_again() -> None:
    machine = PhaseMachine(slow=0.05, patience=2)
    switches = []
    for round, loss in enumerate([2.0, 1.0, 0.5, 0.49, 0.485, 0.48, 0.3, 0.2]):
        why = machine.observe(loss)
        if why is not None:
            switches.append((round, machine.phase, why))
    assert switches == [
        (4, "late", "the loss fell by less than 5.0% a round, 2 times in a row"),
        (7, "early", "the loss fell by more than 10.0% a round, 2 times in a row"),
    ]


losses = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60)


@given(losses, st.floats(0.001, 0.5), st.integers(1, 6))
def test_two_switches_are_at_least_patience_rounds_apart(
    curve: list[float], slow: float, patience: int
) -> None:
    machine = PhaseMachine(slow=slow, patience=patience)
    at, phase = [0], machine.phase
    for round, loss in enumerate(curve):
        why = machine.observe(loss)
        assert (why is not None) == (machine.phase != phase)
        if why is not None:
            at.append(round)
        phase = machine.phase
    assert all(after - before >= patience for before, after in itertools.pairwise(at))


@given(st.lists(st.floats(0.06, 0.09), max_size=40), st.sampled_from(["early", "late"]))
def test_what_lies_between_the_thresholds_changes_nothing(steps: list[float], phase: str) -> None:
    machine = PhaseMachine(slow=0.05, patience=1)
    loss = 1.0
    machine.observe(loss)
    if phase == "late":
        machine.observe(loss)
    assert machine.phase == phase
    for step in steps:
        loss *= 1 - step
        assert machine.observe(loss) is None
