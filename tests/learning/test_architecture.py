"""Real modules are read as what they are, and their layouts keep heads and blocks together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from p2pfl_torrent.core.architecture import Architecture, Group, plan_by_architecture
from p2pfl_torrent.core.chunking import decode_chunk, encode_chunk, slice_of
from p2pfl_torrent.core.tensors import model_hash
from p2pfl_torrent.learning.architecture import architecture_of, describe_layout
from p2pfl_torrent.learning.state import describe, to_arrays
from tests.core.small_models import same_bits
from tests.learning.test_between_peers import exchanged


class Tiny(nn.Module):
    """A Transformer with tied embeddings, named so that the state_dict puts them last."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width)
        self.lm_head = nn.Linear(width, 50, bias=False)
        self.tokens = nn.Embedding(50, width)
        self.position = nn.Embedding(16, width)
        self.lm_head.weight = self.tokens.weight


def test_embeddings_come_first_heads_stay_together_and_a_tied_weight_goes_once() -> None:
    model = Tiny()
    spec = describe(model)
    made_of = architecture_of(model, spec)
    assert made_of.family == "small"
    assert [group.kind for group in made_of.groups[:2]] == ["position", "embedding"]
    made_of = Architecture("transformer", made_of.groups)
    layout = plan_by_architecture(spec, made_of, num_chunks=16, block_size=1024)
    table = describe_layout(layout, made_of).splitlines()
    assert table[0] == "   0      0.002 MB  position: position.weight"
    assert table[1].endswith("embedding: lm_head.weight[0:16]")
    attention = [line for line in table if "in_proj_weight" in line]
    stacks = [[(32 * stack + 8 * head) for stack in range(3)] for head in range(4)]
    assert [line.split(": ")[1].split(", ")[:3] for line in attention] == [
        [f"block.self_attn.in_proj_weight[{row}:{row + 8}]" for row in rows] for rows in stacks
    ]
    arrays = to_arrays(model, spec)
    for chunk in layout.chunks:
        values = decode_chunk(layout, chunk.index, encode_chunk(layout, chunk.index, arrays))
        for part, array in zip(chunk.slices, values, strict=True):
            assert same_bits(array, slice_of(arrays[spec.tensors[part.tensor].name], part))


def test_what_a_module_is_decides_the_family() -> None:
    def family(*layers: nn.Module) -> str:
        model = nn.Sequential(*layers)
        return architecture_of(model, describe(model)).family

    conv = nn.Conv2d(1200, 1200, 3)  # 13 million values
    attention = nn.MultiheadAttention(1700, 4)  # 12 million
    assert family(conv) == "cnn"
    assert family(attention) == "transformer"
    assert family(conv, attention) == "hybrid"
    assert family(nn.Linear(3200, 3200)) == "hybrid"
    assert family(nn.Linear(10_000, 10_010)) == "large"
    assert family(nn.Linear(3, 3)) == "small"


class GroupedAttention(nn.Module):
    """Eight query heads that share two keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 8, 2
        self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 16)


def test_grouped_queries_are_cut_with_the_key_that_they_share() -> None:
    model = nn.Sequential(GroupedAttention())
    (block,) = architecture_of(model, describe(model)).groups
    assert isinstance(block, Group)
    assert (block.kind, block.heads) == ("attention", 2)


@pytest.mark.parametrize("architecture", ["auto", "transformer"])
def test_peers_agree_bit_for_bit_where_chunks_leave_the_order_of_the_tensors(
    architecture: str,
) -> None:
    def train(place: int, model: nn.Module) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(number + 4.0 * place)

    models = [Tiny(128), Tiny(128)]
    first, second = exchanged(models, train, rounds=2, architecture=architecture)
    assert [r.model_hash for r in first] == [r.model_hash for r in second]
    spec = describe(models[0])
    assert first[-1].model_hash == model_hash(spec, to_arrays(models[0], spec)).hex()
    for model in models:
        assert all(torch.all(p == number + 3.0) for number, p in enumerate(model.parameters()))
