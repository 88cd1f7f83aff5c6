"""A model becomes arrays and comes back: tied, 0-d, half precision, integers, odd strides."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.core.tensors import NUMPY_DTYPES, ModelSpec, TensorSpec
from p2pfl_torrent.learning.models import build
from p2pfl_torrent.learning.norms import NormPolicy
from p2pfl_torrent.learning.state import (
    DTYPES,
    LOADED_AT_A_TIME,
    describe,
    explain_mismatch,
    load_arrays,
    snapshot,
    to_arrays,
)


class Tied(nn.Module):
    """A language model in miniature: the decoder's weight is the encoder's."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        if tie:
            self.decoder.weight = self.encoder.weight


class Every(nn.Module):
    """One buffer of each dtype, each with values that a wrong cast would change."""

    def __init__(self, shape: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for dtype in DTYPES:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * 200 - 100
            value = drawn > 0 if dtype == torch.bool else drawn.abs().to(dtype)
            self.register_buffer(f"as_{DTYPES[dtype]}", value)


class Sharded(torch.Tensor):
    """A tensor that stands for others, as FSDP's do."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation leaves out func
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"nothing is computed with it, not even {func}")


class One(nn.Module):
    """One tensor `w` as it is given."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("w", tensor)

    w: torch.Tensor


def scrambled(model: nn.Module) -> nn.Module:
    """The same model with every tensor zeroed."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def test_describe_names_tensors_in_state_dict_order() -> None:
    spec = describe(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    assert spec.tensors == (
        TensorSpec("0.weight", "F32", (2, 3)),
        TensorSpec("0.bias", "F32", (2,)),
        TensorSpec("1.weight", "F32", (2,)),
        TensorSpec("1.bias", "F32", (2,)),
        TensorSpec("1.running_mean", "F32", (2,)),
        TensorSpec("1.running_var", "F32", (2,)),
        TensorSpec("1.num_batches_tracked", "I64", ()),
    )
    assert spec.aliases == ()


def test_a_tied_weight_is_exchanged_once_and_stays_tied() -> None:
    model = Tied()
    spec = describe(model)
    assert [tensor.name for tensor in spec.tensors] == ["scale", "encoder.weight"]
    assert spec.aliases == (("decoder.weight", "encoder.weight"),)
    arrays = snapshot(model, spec)
    before = model.encoder.weight
    load_arrays(scrambled(model), spec, arrays)
    assert model.decoder.weight is model.encoder.weight is before
    assert np.array_equal(model.decoder.weight.detach().numpy(), arrays["encoder.weight"])
    assert model.scale.item() == 2.0


def test_views_that_share_memory_but_differ_are_not_tied() -> None:
    model = nn.Module()
    memory = torch.arange(12.0)
    model.register_buffer("low", memory[:6].view(2, 3))
    model.register_buffer("high", memory[6:].view(2, 3))
    model.register_buffer("turned", memory[:6].view(3, 2))
    model.register_buffer("empty1", torch.empty(0))
    model.register_buffer("empty2", torch.empty(0))
    spec = describe(model)
    assert spec.aliases == ()
    assert len(spec.tensors) == 5


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)])
def test_every_dtype_round_trips_bit_for_bit(shape: tuple[int, ...]) -> None:
    model = Every(shape)
    spec = describe(model)
    assert [tensor.dtype for tensor in spec.tensors] == list(DTYPES.values())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrays = snapshot(model, spec)
    for tensor in spec.tensors:
        array = arrays[tensor.name]
        assert array.shape == shape
        assert array.dtype == NUMPY_DTYPES[tensor.dtype]
        assert array.flags.c_contiguous
    load_arrays(scrambled(model), spec, arrays)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_bfloat16_travels_as_its_raw_bits() -> None:
    model = One(torch.tensor([1.0, -2.0, float("inf")], dtype=torch.bfloat16))
    arrays = to_arrays(model, describe(model))
    assert arrays["w"].tolist() == [0x3F80, 0xC000, 0x7F80]


def test_contiguous_cpu_tensors_alias_the_model_and_a_snapshot_does_not() -> None:
    model = nn.Linear(2, 2)
    spec = describe(model)
    aliasing, owned = to_arrays(model, spec), snapshot(model, spec)
    with torch.no_grad():
        model.weight.fill_(9)
    assert np.all(aliasing["weight"] == 9)
    assert not np.any(owned["weight"] == 9)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(12.0)[::2],
    ],
    ids=["transposed", "channels_last", "strided"],
)
def test_odd_strides_are_kept_in_the_model_and_contiguous_outside(tensor: torch.Tensor) -> None:
    model = One(tensor.clone(memory_format=torch.preserve_format) if tensor.dim() > 1 else tensor)
    spec = describe(model)
    strides = model.w.stride()
    assert not model.w.is_contiguous()
    arrays = snapshot(model, spec)
    assert arrays["w"].flags.c_contiguous
    expected = model.w.clone()
    load_arrays(scrambled(model), spec, arrays)
    assert torch.equal(model.w, expected)
    assert model.w.stride() == strides


def test_a_non_contiguous_parameter_loads_in_place_and_trains_on() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    spec = describe(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    load_arrays(model, spec, {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, "f4")})
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, torch.zeros(2, 3))


def test_read_only_and_strided_arrays_can_be_loaded() -> None:
    model = nn.Linear(2, 3)
    spec = describe(model)
    read_only = np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32).reshape(3, 2)
    load_arrays(model, spec, {"weight": read_only, "bias": np.arange(6, dtype=np.float32)[::2]})
    assert model.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert model.bias.tolist() == [0, 2, 4]


def test_loading_a_mapped_checkpoint_copies_a_few_rows_at_a_time() -> None:
    model = nn.Linear(1 << 11, 1 << 11, bias=False)  # 16 MiB
    spec = describe(model)
    values = np.arange(model.weight.numel(), dtype=np.float32).reshape(model.weight.shape)
    values.setflags(write=False)
    tracemalloc.start()
    try:
        load_arrays(model, spec, {"weight": values})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * LOADED_AT_A_TIME + (1 << 20)
    assert np.array_equal(model.weight.detach().numpy(), values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "'bias' is missing"),
        ({"bias": np.zeros(4, np.float32)}, "'bias' is float32"),
        ({"bias": np.zeros(3, np.float64)}, "'bias' is float64"),
        ({"extra": np.zeros(3, np.float32)}, "'extra' is not part"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    model = nn.Linear(2, 3)
    spec = describe(model)
    before = snapshot(model, spec)
    arrays = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32), **change}
    given = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(ConfigError, match=message):
        load_arrays(model, spec, given)
    assert np.array_equal(before["weight"], to_arrays(model, spec)["weight"])


def test_globs_choose_what_is_exchanged() -> None:
    model = build("small_cnn", (1, 8, 8), 10, seed=0)
    spec = describe(model, include=("conv*", "linear*"), exclude=("linear2.*", "*.bias"))
    names = [tensor.name for tensor in spec.tensors]
    assert names == ["conv1.weight", "conv2.weight", "linear1.weight"]


def test_excluding_one_name_of_a_tied_weight_keeps_it_home() -> None:
    model = Tied()
    spec = describe(model, exclude=("decoder.*",))
    assert [tensor.name for tensor in spec.tensors] == ["scale"]
    assert spec.aliases == ()
    included = describe(model, include=("decoder.*",))
    assert [tensor.name for tensor in included.tensors] == ["encoder.weight"]
    assert included.aliases == (("decoder.weight", "encoder.weight"),)


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'weigth' matches no tensor \(did you mean 'weight'\?"):
        describe(nn.Linear(2, 2), exclude=("weigth",))
    with pytest.raises(ConfigError, match="no tensor to exchange"):
        describe(nn.Linear(2, 2), exclude=("*",))
    with pytest.raises(ConfigError, match="no tensor to exchange"):
        describe(nn.ReLU())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.complex64), "'w' has dtype complex64"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "'w' has dtype float8_e4m3fn"),
        (torch.zeros(2, device="meta"), "'w' is on the meta device"),
        (torch.eye(2).to_sparse(), "'w' has the layout sparse_coo"),
        (torch.zeros(1).expand(3), "'w' repeats one memory cell"),
        (torch.zeros([1] * 17), "'w' has 17 dimensions"),
        (torch.Tensor._make_wrapper_subclass(Sharded, (2,)), "'w' has no memory of its own"),
    ],
)
def test_what_cannot_be_exchanged_is_named(tensor: torch.Tensor, message: str) -> None:
    model = One(tensor)
    model.register_buffer("v", torch.zeros(1))
    with pytest.raises(ConfigError, match=message):
        describe(model)
    assert [tensor.name for tensor in describe(model, exclude=("w",)).tensors] == ["v"]
    mismatch = explain_mismatch(model, ModelSpec((TensorSpec("w", "F32", (2,)),)))
    assert mismatch is not None
    assert mismatch.startswith("Tensor 'w' must be F32[2], but it ")


def test_a_lazy_layer_asks_for_a_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ConfigError, match="one forward pass"):
        describe(model)


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"version": 3}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("stays at home")


def test_extra_state_stays_at_home() -> None:
    model = WithExtraState(2, 1)
    spec = describe(model)
    assert [tensor.name for tensor in spec.tensors] == ["weight", "bias"]
    load_arrays(model, spec, snapshot(model, spec))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Linear(3, 2)), None),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), None),
        (nn.Sequential(nn.Linear(4, 2)), r"'0\.weight' is F32\[2, 4\].*swarm has F32\[2, 3\]"),
        (nn.Sequential(nn.Linear(3, 2).half()), r"'0\.weight' is F16\[2, 3\]"),
        (nn.Sequential(nn.Linear(3, 2, bias=False)), r"'0\.bias' is not in this model"),
        (nn.Linear(3, 2), r"'0\.weight' is not in this model \(did you mean 'weight'\?"),
    ],
)
def test_explain_mismatch_names_the_first_difference(
    model: nn.Module, sentence: str | None
) -> None:
    spec = describe(nn.Sequential(nn.Linear(3, 2)))
    explained = explain_mismatch(model, spec)
    if sentence is None:
        assert explained is None
        return
    assert explained is not None
    assert explained.count(". ") == 0
    with pytest.raises(ConfigError, match=sentence):
        to_arrays(model, spec)


def test_explain_mismatch_sees_ties() -> None:
    tied, untied = describe(Tied()), describe(Tied(tie=False))
    assert explain_mismatch(Tied(), tied) is None
    assert explain_mismatch(Tied(tie=False), tied) == (
        "Tensor 'decoder.weight' is not tied to 'encoder.weight' in this model as in the swarm."
    )
    assert explain_mismatch(Tied(), untied) == (
        "Tensor 'decoder.weight' is tied to 'encoder.weight' in this model, not in the swarm."
    )
    assert explain_mismatch(nn.Embedding(5, 3), ModelSpec((), (("b", "weight"),))) == (
        "Tensor 'b' is not in this model; the swarm ties it to 'weight'."
    )


class ExtraTensor(nn.Linear):
    """Some libraries pack their scaling state into bytes, of another length on each peer."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(5, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("stays at home")


def test_extra_state_that_is_a_tensor_stays_at_home_too() -> None:
    spec = describe(nn.Sequential(ExtraTensor(2, 1), ExtraTensor(1, 1, bias=False)))
    assert [tensor.name for tensor in spec.tensors] == ["0.weight", "0.bias", "1.weight"]


class Copying(nn.Module):
    """What its state_dict gives for one of two layers are copies."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(2, 2)
        self.packed = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        for name in state:
            if name.startswith("packed"):
                state[name] = state[name].clone()
        return state


def test_a_copy_in_the_state_dict_is_refused_since_an_average_in_it_would_be_lost() -> None:
    with pytest.raises(ConfigError, match=r"'packed\.weight' in the state_dict is a copy"):
        describe(Copying())
    spec = describe(Copying(), exclude=("packed.*",))
    assert [tensor.name for tensor in spec.tensors] == ["plain.weight", "plain.bias"]


def test_a_view_of_a_buffer_is_no_copy() -> None:
    model = nn.Module()
    model.register_buffer("whole", torch.arange(6.0))
    model.register_buffer("start", model.get_buffer("whole")[:3])
    load_arrays(model, describe(model), {"whole": np.zeros(6, "f4"), "start": np.ones(3, "f4")})
    assert model.get_buffer("whole").tolist() == [1, 1, 1, 0, 0, 0]


def test_a_lazily_negated_view_is_read_and_written_by_its_values() -> None:
    imaginary = torch.tensor([1 + 2j]).conj().imag
    assert imaginary.is_neg()
    model = One(imaginary)
    spec = describe(model)
    assert snapshot(model, spec)["w"].tolist() == [-2]
    load_arrays(model, spec, {"w": np.array([5], np.float32)})
    assert model.w.tolist() == [5]


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model)
    assert isinstance(wrapped, nn.Module)
    return wrapped


# torch's compiler imports parts of torch that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        lambda model: nn.DataParallel(compiled(model)),
        lambda model: nn.Sequential(compiled(model[0]), nn.DataParallel(model[1]), model[2]),
    ],
    ids=["compiled", "parallel", "both", "inside"],
)
def test_a_wrapped_model_learns_with_a_plain_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

    plain, inner = layers(), layers()
    wrapped = wrap(inner)
    policies: tuple[NormPolicy, ...] = ("average", "local", "recalibrate")
    for policy in policies:
        spec = describe(plain, norm_policy=policy)
        assert describe(wrapped, norm_policy=policy) == spec
        assert describe(wrapped, exclude=("0.*",), norm_policy=policy).tensors == spec.tensors[2:]
    spec = describe(plain)
    load_arrays(wrapped, spec, snapshot(plain, spec))
    assert torch.equal(inner.state_dict()["0.weight"], plain.state_dict()["0.weight"])


def test_a_child_that_is_only_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "_orig_mod": nn.Linear(1, 1)})
    names = [tensor.name for tensor in describe(model, include=("*weight",)).tensors]
    assert names == ["module.weight", "_orig_mod.weight"]


class LanguageModel(nn.Module):
    """As GPT-2: a large vocabulary, the head tied to it, a causal mask that is not saved."""

    def __init__(self, vocabulary: int = 50257, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)


def test_a_huge_tied_embedding_is_sent_once_and_not_copied() -> None:
    model = LanguageModel()
    spec = describe(model)
    assert spec.tensors == (TensorSpec("tokens.weight", "F32", (50257, 8)),)
    assert spec.aliases == (("head.weight", "tokens.weight"),)
    [array] = to_arrays(model, spec).values()
    assert array.__array_interface__["data"][0] == model.head.weight.data_ptr()
    untied = LanguageModel()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    mismatch = explain_mismatch(untied, spec)
    assert mismatch == (
        "Tensor 'head.weight' is not tied to 'tokens.weight' in this model as in the swarm."
    )


def test_frozen_weights_are_exchanged_and_stay_frozen() -> None:
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    spec = describe(model)
    load_arrays(model, spec, {"weight": np.ones((1, 2), "f4"), "bias": np.ones(1, "f4")})
    assert model.weight.tolist() == [[1, 1]]
    assert not model.weight.requires_grad
    assert model.bias.requires_grad


class Absent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("seen", None)


def test_parameters_and_buffers_that_are_none_are_no_part_of_the_model() -> None:
    assert [tensor.name for tensor in describe(Absent()).tensors] == ["w"]


def test_a_snapshot_of_strided_memory_is_copied_once() -> None:
    model = One(torch.arange(6.0).view(2, 3).t())
    array = snapshot(model, describe(model))["w"]
    assert array.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not array.flags.owndata  # torch's copy in one piece, not numpy's copy of that
