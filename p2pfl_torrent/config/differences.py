"""Two peers' terms compared in the words of the configuration: what to change in which file."""

from __future__ import annotations

import re

import msgspec

from p2pfl_torrent.core.genesis import Terms, difference
from p2pfl_torrent.core.tensors import ModelSpec, TensorSpec

MAX_OUTLINE = 4096
"""Bytes of the tensors that a model's term lists: some 100, the first of which tells models apart.
All of a large model's would fill a genesis."""

_KEYS = {
    "name": "swarm.name",
    "seed": "swarm.seed",
    "mode": "federate.mode",
    "fragment_share": "federate.fragment_share",
    "aggregator": "federate.aggregator",
    "overlap": "federate.overlap",
    "compression": "chunk.compression",
    "architecture": "chunk.architecture",
    "rounds.total": "federate.total_round_num",
    "rounds.exchange_timeout": "bittorrent.timeout",
    "rounds.min_completion_ratio": "bittorrent.min_completion_ratio",
    "rounds.critical_share": "bittorrent.critical_share",
    "rounds.fill_max_age": "bittorrent.fill_max_age",
    "rounds.fill": "bittorrent.fill",
    "rounds.fill_decay": "bittorrent.fill_decay",
}  # the other terms of rounds and aggregation are federate's keys of the same name

Outline = tuple[str, int, tuple[TensorSpec, ...]]
"""A fingerprint, the number of tensors, and the first of them."""


def model_term(spec: ModelSpec) -> str:
    """The model among the terms: JSON of its ``Outline``, the same for equal models alone."""
    listed: list[TensorSpec] = []
    left = MAX_OUTLINE
    for tensor in spec.tensors:
        left -= len(msgspec.json.encode(tensor)) + 1
        if left < 0:
            break
        listed.append(tensor)
    outline: Outline = (spec.fingerprint(), len(spec.tensors), tuple(listed))
    return msgspec.json.encode(outline).decode()


def explain(ours: Terms, theirs: Terms) -> str:
    """Every difference, each by its key: ``federate.total_round_num is 8 here and 10 there``.

    A layout is a digest: what else may cut it differently is told once what is known is mended.
    """
    alike = msgspec.structs.replace(theirs, model=ours.model, layout=ours.layout)
    text = difference(ours, alike)
    for path, key in _KEYS.items():
        text = re.sub(rf"(^|; ){re.escape(path)} is ", rf"\g<1>{key} is ", text)
    told = [re.sub(r"(^|; )(?:rounds|aggregation)\.", r"\g<1>federate.", text)] if text else []
    if ours.model != theirs.model:
        told.append(_models(ours.model, theirs.model))
    elif ours.layout != theirs.layout and ours.architecture == theirs.architecture:
        told.append(_layouts(ours.architecture))
    return "; ".join(told)


def _layouts(architecture: str) -> str:
    text = "chunk.num_chunks or chunk.block_size is another one there"
    if architecture == "uniform":
        return text
    return (
        f"{text}, or chunk.architecture: {architecture} reads the model's layers differently there "
        "(other releases of its library): uniform at every peer cuts alike whatever they are"
    )


def _models(ours: str, theirs: str) -> str:
    a, b = _outline(ours), _outline(theirs)
    if a is None or b is None:
        return "the model is another one there"
    (_, count_here, listed_here), (_, count_there, listed_there) = a, b
    for here, there in zip(listed_here, listed_there, strict=False):
        if here != there and here.name == there.name:
            return (
                f"the model's tensor {here.name!r} is {_form(here)} here and {_form(there)} there"
            )
        if here != there:
            return (
                f"where the model has tensor {here.name!r} {_form(here)} here, it has "
                f"{there.name!r} {_form(there)} there"
            )
    if count_here == count_there:
        last = listed_here[-1].name
        return f"the models differ in tensors after {last!r}, or in which weights are tied"
    tensors = "1 tensor" if count_here == 1 else f"{count_here} tensors"
    text = f"the model has {tensors} here and {count_there} there"
    where, longer = ("here", listed_here) if count_here > count_there else ("there", listed_there)
    for tensor in longer[min(count_here, count_there) :]:  # the first, if it is listed
        return f"{text}: {tensor.name!r} {_form(tensor)} is only {where}"
    return text


def _form(tensor: TensorSpec) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _outline(term: str) -> Outline | None:
    """What another peer wrote; None for anything but an outline."""
    try:
        outline = msgspec.json.decode(term, type=Outline)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return outline if outline[2] else None
