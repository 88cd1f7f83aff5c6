"""The phase of training, read from the loss curve: when ``adaptive`` importance switches."""

from __future__ import annotations

import math
from typing import Literal

Phase = Literal["early", "late"]


class PhaseMachine:
    """Early while the loss falls, late once it hardly does; and back, should it fall again.

    Two thresholds and a number of rounds in a row keep noise from switching it to and fro: late
    needs ``patience`` rounds that each improve by less than ``slow``, early as many that each
    improve by more than twice that. An improvement is relative to the loss before; what lies
    between the thresholds, and a loss that rises out of a late phase, changes nothing.

    Args:
        slow: relative improvement per round under which training counts as late, above 0.
        patience: rounds in a row, at least 1.
    """

    def __init__(self, *, slow: float, patience: int) -> None:
        self.phase: Phase = "early"
        self._slow = slow
        self._patience = patience
        self._before: float | None = None
        self._run = 0

    def observe(self, loss: float) -> str | None:
        """Take a round's loss; why the phase switched, or None where it did not.

        A loss that is not finite is passed over: it says nothing about a phase.
        """
        if not math.isfinite(loss):
            return None
        before, self._before = self._before, loss
        if before is None:
            return None
        improved = (before - loss) / max(abs(before), 1e-12)
        if self.phase == "early":
            crosses = improved < self._slow
        else:
            crosses = improved > 2 * self._slow
        self._run = self._run + 1 if crosses else 0
        if self._run < self._patience:
            return None
        self._run = 0
        self.phase = "late" if self.phase == "early" else "early"
        how = "less" if self.phase == "late" else "more"
        bound = self._slow if self.phase == "late" else 2 * self._slow
        return f"the loss fell by {how} than {bound:.1%} a round, {self._patience} times in a row"
