"""Which aggregators there are, by the names that ``federate.aggregator`` takes, and how to add one.

docs/how-to/aggregators.md shows how a program adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.controls import with_controls
from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.robust import LEAST_OWNERS, Distances, Matrix, krum_ranking, trimmed_mean
from p2pfl_torrent.core.server_optimizers import ServerOptimizer, state_spec
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, Array, Arrays, ModelSpec

MAX_NAME = 64  # characters of an aggregator's name

Combine = Callable[[Matrix, Sequence[float]], npt.NDArray[np.float64]]
"""Takes (versions, elements) of float64 and a weight per version; gives a value per element."""


class AggregationTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all peers agree on about aggregation besides its name; bounds as in the configuration.

    Attributes:
        importance_weighting: whether a chunk's weight grows with its rank in its owner's update.
        trim_share: share of the versions that a trimmed mean leaves out on each side.
        byzantine: owners that Krum holds for dishonest; f in Blanchard et al. 2017.
        server_lr, server_beta1, server_beta2, server_tau: of ``server_optimizers``.
    """

    importance_weighting: bool = False
    trim_share: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.2
    byzantine: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 1
    server_lr: Annotated[float, msgspec.Meta(gt=0, le=100)] = 0.01
    server_beta1: Annotated[float, msgspec.Meta(ge=0, le=0.9999)] = 0.9
    server_beta2: Annotated[float, msgspec.Meta(ge=0, le=0.9999)] = 0.99
    server_tau: Annotated[float, msgspec.Meta(ge=1e-9, le=1)] = 1e-3


USUAL = AggregationTerms()


@dataclass(frozen=True, slots=True)
class Aggregator:
    """How the versions of a chunk become one.

    Attributes:
        name: as in the configuration.
        is_weighted: whether versions have weights. If not, each owner has one voice per chunk.
        combine: a coordinate-wise rule; None: the weighted mean. Its result must not depend on
            how elements are cut into tiles, and be the same bits on every machine.
        choose: owners by trust, best first, others excluded; for unweighted ones only.
        least: owners without which it has nothing to go by. A chunk of which fewer than these
            versions came keeps its round-start value; with ``choose``, that rule sees to it.
        believed: how many of these go into a chunk, of those that delivered it; None: all.
        optimizer: turns the merged values into a step of its own.
        has_controls: whether updates carry control variates besides the weights.

    Raises:
        ConfigError: parts that would be silently left unused.
    """

    name: str
    is_weighted: bool = True
    combine: Combine | None = None
    choose: Callable[[Distances], list[PeerId]] | None = None
    least: int = 1
    believed: int | None = None
    optimizer: ServerOptimizer | None = None
    has_controls: bool = False

    def __post_init__(self) -> None:
        if self.choose is not None and self.is_weighted:
            raise ConfigError(
                f"aggregator {self.name!r}: choose is for unweighted ones; set is_weighted=False"
            )
        if self.believed is not None and self.choose is None:
            raise ConfigError(
                f"aggregator {self.name!r}: believed counts the best of a ranking; set choose"
            )

    def update_spec(self, model: ModelSpec) -> ModelSpec:
        """What peers exchange: the model, with control variates where the rule has them."""
        return with_controls(model) if self.has_controls else model

    def state_spec(self, update: ModelSpec) -> ModelSpec:
        """What a round starts from: ``update_spec``, with the moments of an optimizer."""
        return update if self.optimizer is None else state_spec(update)

    def first_state(self, update: ModelSpec, weights: Arrays) -> dict[str, Array]:
        """What the run starts from: the weights, and zeros of all else."""
        return {
            tensor.name: weights[tensor.name]
            if tensor.name in weights
            else np.zeros(tensor.shape, NUMPY_DTYPES[tensor.dtype])
            for tensor in self.state_spec(update).tensors
        }

    def of_the_best(self, ranking: Sequence[PeerId], listed: Sequence[_Listed]) -> list[_Listed]:
        """The versions of the best ranked owners that delivered a chunk, in canonical order."""
        delivered = {owner for owner, _, _ in listed}
        best = [owner for owner in ranking if owner in delivered][: self.believed]
        return [source for source in listed if source[0] in best]


_Listed = TypeVar("_Listed", bound="tuple[PeerId, object, float]")

Factory = Callable[[AggregationTerms], Aggregator]

FEDAVG = Aggregator("fedavg")


def _median(terms: AggregationTerms) -> Aggregator:
    return Aggregator(
        "fedmedian",
        is_weighted=False,
        combine=lambda values, _: trimmed_mean(values, 0.5),
        least=LEAST_OWNERS,
    )


def _trimmed(terms: AggregationTerms) -> Aggregator:
    share = terms.trim_share
    return Aggregator(
        "trimmed_mean",
        is_weighted=False,
        combine=lambda values, _: trimmed_mean(values, share),
        least=LEAST_OWNERS,
    )


def _krum(name: str, believed: int | None) -> Factory:
    def make(terms: AggregationTerms) -> Aggregator:
        return Aggregator(
            name,
            is_weighted=False,
            choose=lambda distances: krum_ranking(distances, terms.byzantine),
            least=LEAST_OWNERS,
            believed=believed,
        )

    return make


def _adaptive(kind: Literal["fedadam", "fedyogi", "fedadagrad"]) -> Factory:
    def make(terms: AggregationTerms) -> Aggregator:
        optimizer = ServerOptimizer(
            kind, terms.server_lr, terms.server_beta1, terms.server_beta2, terms.server_tau
        )
        return Aggregator(kind, optimizer=optimizer)

    return make


_factories: dict[str, Factory] = {
    "fedavg": lambda terms: FEDAVG,
    # Li et al. 2020: the server's part is FedAvg; the proximal term is the user's loss's.
    "fedprox": lambda terms: Aggregator("fedprox"),
    "scaffold": lambda terms: Aggregator("scaffold", has_controls=True),
    "fedmedian": _median,
    "trimmed_mean": _trimmed,
    "krum": _krum("krum", 1),
    "multi_krum": _krum("multi_krum", None),
    "fedadam": _adaptive("fedadam"),
    "fedyogi": _adaptive("fedyogi"),
    "fedadagrad": _adaptive("fedadagrad"),
}


def register_aggregator(name: str, factory: Factory) -> None:
    """Make a name known to ``federate.aggregator``, in this process.

    Every peer of a swarm must have registered the same rule under it: the genesis holds the name
    and the numbers of ``AggregationTerms``, which the factory is given, and no code.

    Raises:
        ConfigError: the name is taken, empty or too long.
    """
    if not 1 <= len(name) <= MAX_NAME:
        raise ConfigError(f"An aggregator's name has 1 to {MAX_NAME} characters, not {len(name)}.")
    if name in _factories:
        raise ConfigError(f"Aggregator {name!r} is registered already: choose another name.")
    _factories[name] = factory


def make_aggregator(name: str, terms: AggregationTerms = USUAL) -> Aggregator:
    """The aggregator of a name.

    Raises:
        ConfigError: there is none.
    """
    factory = _factories.get(name)
    if factory is None:
        raise ConfigError(
            f"federate.aggregator is {name!r}: use one of {', '.join(_factories)}, or register it "
            "before the configuration is read."
        )
    return factory(terms)
