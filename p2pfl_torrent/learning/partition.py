"""Who gets which samples: partitions of a labelled data set among peers.

Every function returns one sorted int64 index array per part; together they are a disjoint cover
of ``range(len(labels))``. Equal arguments and an equally seeded generator give equal partitions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.errors import ConfigError

Indices = npt.NDArray[np.int64]

DEFAULT_MIN_SAMPLES = 10  # a part that cannot fill a batch says little about its peer

MAX_ALPHA = 1e6  # as good as iid; near 1e308 the drawn shares overflow, and one part gets all

# Redrawing keeps the Dirichlet shape; where bad luck lasts this long (tiny alpha, many parts) the
# smallest parts are topped up from the largest instead.
MAX_DRAWS = 50


def iid(samples: int, parts: int, rng: np.random.Generator) -> list[Indices]:
    """Shuffle and deal: part sizes differ by at most one."""
    _check(samples, parts, 0)
    return [np.sort(part) for part in np.array_split(rng.permutation(samples), parts)]


def dirichlet(
    labels: npt.ArrayLike,
    parts: int,
    alpha: float,
    rng: np.random.Generator,
    min_samples: int = DEFAULT_MIN_SAMPLES,
) -> list[Indices]:
    """Split every label among the parts by shares drawn from Dirichlet(alpha, ..., alpha).

    The label skew of Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution"
    (2019): alpha 100 is close to iid, 0.1 leaves most parts with one or two labels.

    Args:
        labels: one integer per sample.
        alpha: concentration, above 0.
        min_samples: no part is smaller.

    Raises:
        ConfigError: there are fewer than ``parts * min_samples`` samples, or alpha is out of range.
    """
    targets = np.asarray(labels)
    _check(targets.size, parts, min_samples)
    if not 0 < alpha <= MAX_ALPHA:
        raise ConfigError(
            f"dirichlet(alpha) needs an alpha above 0 and at most {MAX_ALPHA:g}, got {alpha}."
        )
    by_label = [np.flatnonzero(targets == label) for label in np.unique(targets)]
    for _ in range(MAX_DRAWS):
        drawn = _draw_dirichlet(by_label, parts, alpha, rng)
        if min(part.size for part in drawn) >= min_samples:
            break
    else:
        _top_up(drawn, min_samples, rng)
    return [np.sort(part) for part in drawn]


def label_skew(
    labels: npt.ArrayLike, parts: int, labels_per_part: int, rng: np.random.Generator
) -> list[Indices]:
    """Give every part samples of exactly `labels_per_part` labels, each label to equally many.

    The pathological split of McMahan et al. (AISTATS 2017) in the form of Li et al. (ICDE 2022):
    a label's samples are dealt evenly among the parts that hold it.

    Raises:
        ConfigError: a label would be left out, or has fewer samples than parts that hold it.
    """
    targets = np.asarray(labels)
    _check(targets.size, parts, 1)
    present = np.unique(targets)
    if not 1 <= labels_per_part <= present.size:
        raise ConfigError(
            f"label_skew({labels_per_part}) needs between 1 and {present.size} labels for each "
            f"part: the data has {present.size} labels."
        )
    if parts * labels_per_part < present.size:
        raise ConfigError(
            f"label_skew({labels_per_part}) over {parts} parts holds {parts * labels_per_part} of "
            f"{present.size} labels: ask for more parts or more labels for each."
        )
    held = _deal_labels(present.size, parts, labels_per_part, rng)
    shares: list[list[Indices]] = [[] for _ in range(parts)]
    for position, label in enumerate(present):
        owners = [part for part in range(parts) if position in held[part]]
        indices = rng.permutation(np.flatnonzero(targets == label))
        if indices.size < len(owners):
            raise ConfigError(
                f"label_skew({labels_per_part}) over {parts} parts splits label {label} among "
                f"{len(owners)} parts, but it has only {indices.size} samples."
            )
        for owner, share in zip(owners, np.array_split(indices, len(owners)), strict=True):
            shares[owner].append(share)
    return [np.sort(np.concatenate(share)) for share in shares]


_Split = Callable[[npt.NDArray[np.generic], int, float, np.random.Generator, int], list[Indices]]

_SCHEMES: dict[str, tuple[str, _Split]] = {
    "iid": ("iid", lambda labels, parts, _, rng, __: iid(labels.size, parts, rng)),
    "dirichlet": ("dirichlet(0.5)", dirichlet),
    "label_skew": (
        "label_skew(2)",
        lambda labels, parts, value, rng, _: label_skew(labels, parts, int(value), rng),
    ),
}

_SPEC = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?:\(\s*(?P<value>[0-9.eE+-]*)\s*\))?\s*")


def partition(
    spec: str,
    labels: npt.ArrayLike,
    parts: int,
    rng: np.random.Generator,
    min_samples: int = DEFAULT_MIN_SAMPLES,
) -> list[Indices]:
    """Partition by a written scheme: ``iid``, ``dirichlet(0.5)`` or ``label_skew(2)``.

    Raises:
        ConfigError: the spec is not one of these, or the data cannot be split so.
    """
    name, value = parse(spec)
    targets = np.asarray(labels)
    _check(targets.size, parts, 1)  # nobody can train on an empty part
    return _SCHEMES[name][1](targets, parts, value, rng, min_samples)


def parse(spec: str) -> tuple[str, float]:
    """The scheme's name and its number (0 for ``iid``); ConfigError if it is not a scheme."""
    wrong = ConfigError(
        f"Unknown partition {spec!r}: write one of "
        f"{', '.join(example for example, _ in _SCHEMES.values())}."
    )
    match = _SPEC.fullmatch(spec)
    if match is None or match["name"] not in _SCHEMES:
        raise wrong
    name, written = match["name"], match["value"]
    if name == "iid":
        if written:
            raise ConfigError(f"Partition 'iid' takes no number, got {spec!r}: write iid.")
        return name, 0.0
    example = _SCHEMES[name][0]
    try:
        value = float(written or "")
    except ValueError:
        raise ConfigError(f"Partition {spec!r} needs one number: write {example}.") from None
    if name == "label_skew" and not value.is_integer():
        raise ConfigError(f"Partition {spec!r} needs a whole number of labels: write {example}.")
    return name, value


def _check(samples: int, parts: int, min_samples: int) -> None:
    if parts < 1:
        raise ConfigError(f"A partition needs at least 1 part, got {parts}.")
    if samples < parts * min_samples:
        raise ConfigError(
            f"{samples} samples cannot give each of {parts} parts at least {min_samples}: ask for "
            f"fewer parts."
        )


def _draw_dirichlet(
    by_label: Sequence[Indices], parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares: list[list[Indices]] = [[] for _ in range(parts)]
    for indices in by_label:
        proportions = rng.dirichlet(np.full(parts, alpha))
        cuts = np.round(np.cumsum(proportions)[:-1] * indices.size).astype(np.int64)
        for part, share in enumerate(np.split(rng.permutation(indices), cuts)):
            shares[part].append(share)
    return [np.concatenate(share) if share else np.empty(0, np.int64) for share in shares]


def _top_up(drawn: list[Indices], min_samples: int, rng: np.random.Generator) -> None:
    """Move random samples from the largest part to each that is short, one short part at a time."""
    for part in range(len(drawn)):
        while drawn[part].size < min_samples:
            largest = max(range(len(drawn)), key=lambda other: (drawn[other].size, -other))
            spare = drawn[largest].size - min_samples
            moved = min(min_samples - drawn[part].size, spare)
            shuffled = rng.permutation(drawn[largest])
            drawn[part] = np.concatenate([drawn[part], shuffled[:moved]])
            drawn[largest] = shuffled[moved:]


def _deal_labels(
    labels: int, parts: int, labels_per_part: int, rng: np.random.Generator
) -> list[set[int]]:
    """For each part its label positions: always those held least so far, so none is left out."""
    holders = np.zeros(labels, dtype=np.int64)
    held = []
    for _ in range(parts):
        order = np.lexsort((rng.random(labels), holders))
        chosen = order[:labels_per_part]
        holders[chosen] += 1
        held.append({int(position) for position in chosen})
    return held
