"""This peer's own control variate, kept so that a restart goes on with it."""

from __future__ import annotations

from pathlib import Path

from p2pfl_torrent.core.controls import controls_of, only_controls
from p2pfl_torrent.core.tensors import Arrays, ModelSpec
from p2pfl_torrent.store import Checkpoints, StoreError

KEPT = 2  # that of the update that is being made, and the one before it


class OwnControls:
    """``<state>/controls/checkpoints/round-N.safetensors``: as the update of round N has it.

    Durable before that is published; compression may send others something less exact.
    """

    def __init__(self, state_dir: Path, spec: ModelSpec) -> None:
        self._spec = spec
        self._kept = Checkpoints(state_dir / "controls", controls_of(spec))

    def before(self, round: int) -> Arrays | None:
        """What a round is trained with; None, for zeros, if there was none, or it is damaged."""
        earlier = [kept for kept in self._kept.rounds() if kept < round]
        if not earlier:
            return None
        try:
            return self._kept.load(earlier[-1])
        except StoreError:  # its loss costs some learning; refusing to go on would cost all
            return None

    def keep(self, round: int, update: Arrays) -> None:
        """Keep the controls of a round's update, before it is published."""
        self._kept.save(round, only_controls(update, self._spec))
        self._kept.prune(KEPT)
