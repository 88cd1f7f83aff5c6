"""What a torch module is made of, read from the types of its modules.

Kinds are known by class names, as those of norm layers are, so that the blocks of other libraries
(BertAttention, GPT2Attention, LlamaAttention) and torch's own are known alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from p2pfl_torrent.core.architecture import (
    LARGE_ABOVE,
    SMALL_BELOW,
    Architecture,
    Family,
    Group,
    Kind,
    Part,
)
from p2pfl_torrent.core.chunking import Layout
from p2pfl_torrent.core.tensors import ModelSpec
from p2pfl_torrent.learning.norms import is_norm
from p2pfl_torrent.learning.wrappers import unwrapping

_CONV = nn.modules.conv._ConvNd

_HEADS = ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads", "n_head")
"""Attributes that say how many heads there are; where queries share keys, how many keys."""

_PROJECTIONS: Mapping[str, int] = {
    **dict.fromkeys(("query", "key", "value", "q", "k", "v", "wq", "wk", "wv"), 1),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin"), 1),
    **dict.fromkeys(("to_q", "to_k", "to_v"), 1),
    "query_key_value": 1,  # GPT-NeoX and BLOOM: a head's query, key and value are neighbours
    **dict.fromkeys(("qkv", "to_qkv", "in_proj"), 3),
}
"""Name of a linear layer -> times that all heads lie one after the other in its rows."""

_MHA_STACKS: Mapping[str, int] = {
    "in_proj_weight": 3,
    "in_proj_bias": 3,
    "q_proj_weight": 1,
    "k_proj_weight": 1,
    "v_proj_weight": 1,
}
"""Parameters of ``nn.MultiheadAttention`` with heads in their rows."""

_POSITIONS = ("position", "pos_emb", "wpe")
_HEAD_NAMES = ("lm_head", "classifier", "head", "fc", "cls")


def architecture_of(model: nn.Module, spec: ModelSpec) -> Architecture:
    """The groups of a model, and its family by what is exchanged of it.

    Position embeddings come first, then other embeddings, then the modules as they are nested.
    The family is ``small`` below ten million exchanged values, ``large`` above a hundred; between,
    ``cnn`` or ``transformer`` where only convolutions or only attention are found, else
    ``hybrid``.

    Args:
        spec: of this model, as ``describe`` gives it.
    """
    reader = _Reader(unwrapping(model))
    rest = reader.members(model, "")
    groups = [
        Group("position", tuple(reader.positions)),
        Group("embedding", tuple(reader.embeddings)),
    ]
    groups += [part if isinstance(part, Group) else Group("other", (part,)) for part in rest]
    return Architecture(_family(model, spec), tuple(group for group in groups if group.members))


def describe_layout(layout: Layout, architecture: Architecture) -> str:
    """A table of a layout: for each chunk its number, megabytes, kinds of layers and slices."""
    kinds: dict[str, str] = {}
    for group in architecture.groups:
        for name, kind in _kinds(group):
            kinds.setdefault(name, kind)
    canonical = dict(layout.spec.aliases)
    kinds.update({canonical[name]: kind for name, kind in kinds.items() if name in canonical})
    lines = []
    for chunk in layout.chunks:
        names = [layout.slice_name(part) for part in chunk.slices]
        found = (kinds.get(layout.spec.tensors[p.tensor].name, "other") for p in chunk.slices)
        shown = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
        lines.append(
            f"{chunk.index:4}  {chunk.payload_bytes / 1e6:9.3f} MB  "
            f"{'+'.join(dict.fromkeys(found))}: {', '.join(shown)}"
        )
    return "\n".join(lines)


def _kinds(group: Group) -> Iterator[tuple[str, Kind]]:
    for member in group.members:
        if isinstance(member, Group):
            yield from _kinds(member)
        else:
            yield member.name, group.kind


def _family(model: nn.Module, spec: ModelSpec) -> Family:
    values = sum(tensor.size for tensor in spec.tensors)
    if values < SMALL_BELOW:
        return "small"
    if values > LARGE_ABOVE:
        return "large"
    attends = any(_is_attention(module) for module in model.modules())
    convolves = any(isinstance(module, _CONV) for module in model.modules())
    if attends == convolves:
        return "hybrid"
    return "transformer" if attends else "cnn"


def _is_attention(module: nn.Module) -> bool:
    """Whether this is an attention block by the name of its type or of a base class."""
    if next(module.parameters(), None) is None:
        return False
    return any("Attention" in cls.__name__ for cls in type(module).__mro__)


def _head_count(module: nn.Module) -> int:
    for part in module.modules():
        for holder in (part, getattr(part, "config", None)):
            for attribute in _HEADS:
                count = getattr(holder, attribute, None)
                if isinstance(count, int) and count > 1:
                    return count
    return 1


class _Reader:
    """Walks the modules of a model; embeddings are put aside."""

    def __init__(self, unwrapped: Callable[[str], str]) -> None:
        self._unwrapped = unwrapped
        self.positions: list[Part] = []
        self.embeddings: list[Part] = []

    def members(
        self, module: nn.Module, path: str, *, attends: bool = False
    ) -> tuple[Part | Group, ...]:
        """A module's own tensors, then a group for each of its children.

        Args:
            attends: inside an attention block.
        """
        found: list[Part | Group] = []
        # Not state_dict(): only the module's own names are wanted, without a copy or a hook.
        for name in (*module._parameters, *module._buffers):
            full = self._unwrapped(f"{path}{name}")
            if any(word in full.lower() for word in _POSITIONS) and not attends:
                self.positions.append(Part(full))
            elif isinstance(module, nn.Embedding) and not attends:
                self.embeddings.append(Part(full))
            else:
                found.append(Part(full, _stacks(module, path, name) if attends else 0))
        for name, child in module.named_children():
            inside = attends or _is_attention(child)
            heads = _head_count(child) if inside and not attends else 1
            members = self.members(child, f"{path}{name}.", attends=inside)
            if members:
                found.append(Group(_kind(name, child, attends=inside), members, heads))
        return tuple(found)


def _stacks(module: nn.Module, path: str, name: str) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return _MHA_STACKS.get(name, 0)
    # Other layers of that name (GPT-2's Conv1D) may hold inputs in their rows.
    if isinstance(module, nn.Linear):
        return _PROJECTIONS.get(path.removesuffix(".").rpartition(".")[2], 0)
    return 0


def _kind(name: str, module: nn.Module, *, attends: bool) -> Kind:
    if is_norm(module):
        return "norm"
    if attends:
        return "attention"
    if isinstance(module, _CONV):
        return "conv"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "head" if name in _HEAD_NAMES else "linear"
    return "other"
