"""The user's torch model between two exchanges: what is read from it, what is written back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from p2pfl_torrent.config import PeerConfig
from p2pfl_torrent.core.aggregators import make_aggregator
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.reports import RoundReport
from p2pfl_torrent.core.tensors import Array, Arrays
from p2pfl_torrent.learning.architecture import architecture_of
from p2pfl_torrent.learning.norms import recalibrate
from p2pfl_torrent.learning.scaffold import Scaffold
from p2pfl_torrent.learning.state import (
    Module,
    Optimizer,
    describe,
    load_arrays,
    parameter_names,
    snapshot,
    to_arrays,
)

Evaluate = Callable[[Module], Mapping[str, float]]
"""Scores a model; the keys ``loss`` and ``accuracy`` are shown before and after merging."""


class LocalModel:
    """A model, its optimizer, and what else the user handed over with it.

    Args:
        evaluate: called before and after each merge.
        optimizer: needed for ``federate.on_merge: reset``, which empties its state after merging.
        calibration: batches (tensors, or tuples with the input first) for
            ``chunk.norm_policy: recalibrate``.
        controls: what corrects the gradients, for ``federate.aggregator: scaffold``.

    Raises:
        ConfigError: the configuration asks for something that was not handed over.
    """

    def __init__(
        self,
        config: PeerConfig,
        model: Module,
        *,
        evaluate: Evaluate | None,
        optimizer: Optimizer | None,
        calibration: Iterable[Any] | None,
        controls: Scaffold | None = None,
    ) -> None:
        aggregator = config.federate.aggregator
        if make_aggregator(aggregator).has_controls != (controls is not None):
            raise ConfigError(
                f"federate.aggregator is {aggregator}: with scaffold, and only with it, give the "
                "Peer controls=Scaffold(model, optimizer)."
            )
        if config.federate.on_merge == "reset" and optimizer is None:
            raise ConfigError(
                "federate.on_merge is reset: give the Peer your optimizer, as optimizer=..."
            )
        if config.chunk.norm_policy == "recalibrate" and calibration is None:
            raise ConfigError(
                "chunk.norm_policy is recalibrate: give the Peer batches, as calibration=..."
            )
        self.model = model
        self.spec = describe(
            model,
            include=config.chunk.include,
            exclude=config.chunk.exclude,
            norm_policy=config.chunk.norm_policy,
        )
        self.spec.validate()
        self.architecture = architecture_of(model, self.spec)
        self.parameters = parameter_names(model)
        self._evaluate = evaluate
        self._optimizer = optimizer if config.federate.on_merge == "reset" else None
        self._recalibrates = config.chunk.norm_policy == "recalibrate"
        self._calibration = calibration
        self._controls = controls

    def arrays(self) -> dict[str, Array]:
        """The exchanged tensors; CPU tensors are views of the model, not copies."""
        arrays = to_arrays(self.model, self.spec)
        return arrays if self._controls is None else {**arrays, **self._controls.controls()}

    def copy(self) -> dict[str, Array]:
        """The exchanged tensors as they are now, owned by the caller."""
        return snapshot(self.model, self.spec)

    def load(self, arrays: Arrays, own_controls: Arrays | None = None) -> None:
        """Write what a round starts from into the model, in place.

        Args:
            arrays: the weights, with the swarm's controls where there are some.
            own_controls: this peer's; None for zeros.
        """
        weights = {tensor.name: arrays[tensor.name] for tensor in self.spec.tensors}
        load_arrays(self.model, self.spec, weights)
        if self._controls is not None:
            self._controls.begin(arrays, own_controls)

    def score(self) -> tuple[float | None, float | None]:
        """(loss, accuracy) by the user's ``evaluate``."""
        if self._evaluate is None:
            return None, None
        scores = self._evaluate(self.model)
        return scores.get("loss"), scores.get("accuracy")

    def merged(
        self,
        arrays: Arrays | None,
        report: RoundReport,
        own_controls: Arrays | None,
        before: tuple[float | None, float | None],
        tell: Callable[[RoundReport], object],
    ) -> RoundReport:
        """Take an exchange's outcome into the model; the report with the scores filled in.

        Args:
            tell: given the report, without what the user's ``evaluate`` or batches failed to give:
                the round is over all the same.
        """
        report = replace(report, loss_before=before[0], accuracy_before=before[1])
        if arrays is not None:
            self.load(arrays, own_controls)
        try:
            if arrays is not None:
                report = self._scored(report)
        finally:
            tell(report)
        return report

    def _scored(self, report: RoundReport) -> RoundReport:
        if self._optimizer is not None:
            self._optimizer.state.clear()
        if self._recalibrates and self._calibration is not None:
            recalibrate(self.model, self._calibration)
        loss, accuracy = self.score()
        return replace(report, loss_after=loss, accuracy_after=accuracy)
