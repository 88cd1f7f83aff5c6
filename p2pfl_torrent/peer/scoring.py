"""Scores the chunks of this peer's update by the configured method."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from p2pfl_torrent.config import ChunkSection
from p2pfl_torrent.config.schema import GRADIENT_METHODS, ChosenMethod, PlainMethod
from p2pfl_torrent.core.architecture import Architecture
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.importance import (
    Moments,
    change_scores,
    delta_scores,
    l2_norm_scores,
    magnitude_scores,
    random_scores,
    rank,
)
from p2pfl_torrent.core.phases import PhaseMachine
from p2pfl_torrent.core.tensors import Array, Arrays

LastDelivered = Callable[[int], Sequence[Array]]
"""Chunk index -> its slices as others last received them from this peer."""

StartWeights = Callable[[], Arrays]
"""The weights that the round began with."""


class Gradients(Protocol):
    """What scoring asks of ``learning.gradients.GradientStats``, so that a node needs no torch."""

    @property
    def has_samples(self) -> bool:
        """Whether it can compute gradients of its own."""

    def try_samples(self, method: str) -> None:
        """Raise ConfigError if the samples, where there are some, are of no use to the method."""

    def watch(
        self,
        layout: Layout,
        method: str,
        *,
        history_window: int,
        max_steps: int,
        from_samples: bool,
    ) -> None:
        """Gather what a method needs."""

    def moments(self, round: int) -> list[list[Moments]]:
        """Per round remembered, per chunk."""

    def snip(self, round: int, *, batch_size: int, use_cached: bool) -> list[float]:
        """One score per chunk."""

    def fisher(self, round: int, *, num_samples: int, damping: float) -> list[float]:
        """One score per chunk."""


BY_FAMILY: Mapping[str, ChosenMethod] = {
    "cnn": "magnitude",
    "transformer": "fisher",
    "hybrid": "adaptive",
    "small": "l2_norm",
    "large": "snip",
}
"""The seed's method for each family of models, which ``auto`` takes where there are gradients."""


def chosen_method(
    config: ChunkSection, architecture: Architecture | None, gradients: Gradients | None
) -> ChosenMethod:
    """The configured method; for ``auto``, the one for this model and what was handed over.

    Raises:
        ConfigError: it needs what the user did not hand over, or its samples are of no use.
    """
    method: ChosenMethod
    if config.importance_method != "auto":
        method = config.importance_method
    elif gradients is None or architecture is None:
        method = "change"
    else:
        method = BY_FAMILY.get(config.architecture, BY_FAMILY[architecture.family])
    _check_gradients(config, method, gradients)
    if gradients is not None:
        for each in _needing(config, method):
            if each == "fisher" or (
                each == "snip" and not config.importance_config.snip.use_cached
            ):
                gradients.try_samples(each)
    return method


def _needing(config: ChunkSection, method: ChosenMethod) -> list[str]:
    """The methods by gradients that a method is or uses."""
    methods: list[str] = [method]
    if method == "adaptive":
        adaptive = config.importance_config.adaptive
        methods = [adaptive.early, adaptive.late]
    return [each for each in methods if each in GRADIENT_METHODS]


def _check_gradients(
    config: ChunkSection, method: ChosenMethod, gradients: Gradients | None
) -> None:
    needing = _needing(config, method)
    if needing and gradients is None:
        by = f" (which uses {needing[0]})" if method == "adaptive" else ""
        raise ConfigError(
            f"chunk.importance_method is {method}{by}: give the Peer gradient statistics, as "
            "gradients=GradientStats(model, optimizer)."
        )
    wants_samples = "snip" in needing and not config.importance_config.snip.use_cached
    if wants_samples and gradients is not None and not gradients.has_samples:
        raise ConfigError(
            "chunk.importance_config.snip.use_cached is false: give GradientStats data, loss=... "
            "and samples=(inputs, targets), or make it true."
        )


class ImportanceScorer:
    """Ranks chunks, 0 for the least important.

    Args:
        method: as ``chosen_method`` has it.
        gradients: watched from now on, where the method needs them.

    Raises:
        ConfigError: the method needs gradients that are not given.
    """

    def __init__(
        self,
        config: ChunkSection,
        method: ChosenMethod,
        layout: Layout,
        rng: random.Random,
        gradients: Gradients | None,
    ) -> None:
        _check_gradients(config, method, gradients)
        self._settings = config.importance_config
        self._layout = layout
        self._rng = rng
        self._gradients = gradients
        self._phases: PhaseMachine | None = None
        self._seen_round = 0
        if method == "adaptive":
            adaptive = self._settings.adaptive
            self._phases = PhaseMachine(slow=adaptive.slow, patience=adaptive.patience)
            method = adaptive.early
        self._use(method)

    def _use(self, method: PlainMethod) -> None:
        self.method: PlainMethod = method
        if method not in GRADIENT_METHODS:
            return
        assert self._gradients is not None  # the constructor has refused it
        self._gradients.watch(
            self._layout,
            method,
            history_window=self._settings.magnitude.history_window,
            max_steps=self._settings.fisher.num_samples,
            from_samples=method == "snip" and not self._settings.snip.use_cached,
        )

    def observe(self, round: int, loss: float | None) -> str | None:
        """Take a round's training loss, once; why ``method`` is another one from the next round on.

        The update of this round is still scored by the method it was trained under.
        """
        if self._phases is None or loss is None or round == self._seen_round:
            return None
        self._seen_round = round
        why = self._phases.observe(loss)
        if why is not None:
            adaptive = self._settings.adaptive
            self._use(adaptive.early if self._phases.phase == "early" else adaptive.late)
        return why

    def ranks(
        self, round: int, arrays: Arrays, last: LastDelivered, start: StartWeights
    ) -> list[int]:
        """A permutation of the chunk indices' ranks."""
        layout = self._layout
        if self.method == "random":
            return rank(random_scores(layout, self._rng))
        if self.method == "l2_norm":
            l2_norm = self._settings.l2_norm
            return rank(
                l2_norm_scores(
                    layout,
                    arrays,
                    depth_boost=l2_norm.depth_boost,
                    normalize_by_size=l2_norm.normalize_by_size,
                )
            )
        if self.method == "delta":
            return rank(delta_scores(layout, arrays, start()))
        if self.method == "change":
            return rank(change_scores(layout, arrays, last))
        assert self._gradients is not None  # the constructor has refused it
        return rank(self._by_gradients(self._gradients, round))

    def _by_gradients(self, gradients: Gradients, round: int) -> list[float]:
        if self.method == "snip":
            snip = self._settings.snip
            return gradients.snip(round, batch_size=snip.batch_size, use_cached=snip.use_cached)
        if self.method == "fisher":
            fisher = self._settings.fisher
            return gradients.fisher(round, num_samples=fisher.num_samples, damping=fisher.damping)
        return magnitude_scores(
            gradients.moments(round),
            chunks=len(self._layout.chunks),
            use_variance=self._settings.magnitude.use_variance,
        )
