"""torchvision's own code on files in its own layout; only the pixels are made up here."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from p2pfl_torrent.core.errors import ConfigError
from p2pfl_torrent.learning.datasets import load

Bytes = npt.NDArray[np.uint8]

vision: Any = pytest.importorskip(
    "torchvision.datasets", reason="torchvision is not installed: pip install torchvision"
)


def mnist_files(root: Path) -> tuple[Bytes, Bytes]:
    """MNIST's files below a root as torchvision unpacks them: the training images and labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    halves = {}
    for half, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count, np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (raw / f"{half}-{name}-ubyte").write_bytes(header + array.tobytes())
        halves[half] = images, labels
    return halves["train"]


def text(written: str) -> bytes:
    """A Python 2 string in a pickle."""
    return b"U" + bytes([len(written)]) + written.encode()


def cifar_batch(title: str, pixels: Bytes, labels: list[int]) -> bytes:
    """A batch as Python 2 and numpy 1 pickled the published files.

    Written by hand: today's pickle writes other opcodes, and names another module for arrays.
    """
    rows, columns = pixels.shape
    integers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    minus_one = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * minus_one + b"K\x00tb"
    body = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    array = start + b"(K\x01" + shape + dtype + b"\x89" + body + b"tb"
    entries = [text("batch_label") + text(title), text("labels") + b"](" + integers + b"e"]
    names = text("filenames") + b"](" + b"".join(text(f"a_{n}.png") for n in range(rows)) + b"e"
    return b"\x80\x02}(" + b"".join(entries) + text("data") + array + names + b"u."


def cifar_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Bytes, list[int]], tuple[Bytes, list[int]]]:
    """CIFAR-10's seven files with 3 images a batch, and their sums in torchvision's lists."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    sums = {}
    pixels, labels = [], []
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels.append(rng.integers(0, 256, (3, 3 * 32 * 32), np.uint8))
        labels.append([int(label) for label in rng.integers(0, 10, 3)])
        content = cifar_batch(name, pixels[-1], labels[-1])
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    listed = b"](" + b"".join(text(name) for name in classes) + b"e"
    meta = b"\x80\x02}(" + text("label_names") + listed + text("num_vis") + b"M\x00\x0cu."
    (folder / "batches.meta").write_bytes(meta)
    cifar = vision.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": hashlib.md5(meta).hexdigest()})
    training = np.concatenate(pixels[:5]), [label for five in labels[:5] for label in five]
    return training, (pixels[5], labels[5])


def test_mnist_as_torchvision_reads_it(tmp_path: Path) -> None:
    images, labels = mnist_files(tmp_path)
    train, test = load("torchvision:MNIST", tmp_path)
    assert (train.in_shape, train.classes, len(test)) == ((1, 28, 28), 10, 4)
    assert np.array_equal(train.x[:, 0], images)
    assert np.array_equal(train.y, labels)
    ours, _ = load("mnist", tmp_path)
    assert np.array_equal(ours.x, train.x)
    assert np.array_equal(ours.y, train.y)


def test_cifar_10_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pixels, labels), (test_pixels, test_labels) = cifar_files(tmp_path, monkeypatch)
    train, test = load("torchvision:CIFAR10", tmp_path)
    assert (train.in_shape, train.classes) == ((3, 32, 32), 10)
    # A row of the file is a whole red plane, then green, then blue: channels first already.
    assert np.array_equal(train.x.reshape(15, -1), pixels)
    assert train.x.flags.c_contiguous
    assert train.y.tolist() == labels
    assert np.array_equal(test.x.reshape(3, -1), test_pixels)
    assert test.y.tolist() == test_labels


def test_a_missing_set_is_told(tmp_path: Path) -> None:
    for name in ("MNIST", "CIFAR10"):
        with pytest.raises(ConfigError, match=f"torchvision:{name} is not in .*--download"):
            load(f"torchvision:{name}", tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(7), b"\0\0\x08\x03" + bytes(12) + b"xx"])
def test_a_damaged_mnist_is_told(tmp_path: Path, content: bytes) -> None:
    mnist_files(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ConfigError, match=r"MNIST in .*: delete it and fetch it again"):
        load("torchvision:MNIST", tmp_path)


def test_a_damaged_cifar_10_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar_files(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(b"cbuiltins\nexit\n(tR." + file.read_bytes())
    with pytest.raises(ConfigError, match=r"is not in .*, or damaged"):
        load("torchvision:CIFAR10", tmp_path)


def test_more_sets_of_that_form(tmp_path: Path) -> None:
    mnist_files(tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / "FashionMNIST")
    train, _ = load("torchvision:FashionMNIST", tmp_path)
    assert (len(train), train.classes) == (6, 10)
    for name in ("SVHN", "EMNIST", "QMNIST", "ImageFolder"):
        with pytest.raises(ConfigError, match="no training and test half"):
            load(f"torchvision:{name}", tmp_path)
