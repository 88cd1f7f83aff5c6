"""Virtual environments for systems that cannot live in ours, made once and kept in a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INSTALL_PATIENCE = 900.0  # seconds; some hundred megabytes over a slow line


class PreparationError(Exception):
    """A system cannot be had here; the text says why in a sentence."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What to install: every package pinned, none resolved by pip.

    Attributes:
        pythons: minor versions of Python 3 that all of it has wheels for, best first.
    """

    name: str
    requirements: tuple[str, ...]
    pythons: tuple[int, ...]

    @property
    def folder(self) -> str:
        """A name that changes with what is in it."""
        text = "\n".join((*self.requirements, *map(str, self.pythons)))
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def default_cache() -> Path:
    """Where this user's caches are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "p2pfl-torrent" / "benchmarks"


def find_python(minors: tuple[int, ...]) -> str | None:
    """A Python of one of these versions: this one, else what the PATH has."""
    if sys.version_info.minor in minors:
        return sys.executable
    found = (shutil.which(f"python3.{minor}") for minor in minors)
    return next((path for path in found if path and _starts(path)), None)


def _starts(python: str) -> bool:
    """A version switcher's stub may stand for a version that is not installed."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def prepare(environment: Environment, cache: Path) -> Path:
    """The Python of an environment that is there, after making it where needed.

    Raises:
        PreparationError: no fitting Python, or pip could not install it.
    """
    folder = cache / environment.folder
    python = folder / "bin" / "python"
    ready = folder / "ready"
    with _alone(cache, environment.folder):
        if ready.exists():
            return python
        base = find_python(environment.pythons)
        if base is None:
            versions = ", ".join(f"3.{minor}" for minor in environment.pythons)
            raise PreparationError(f"{environment.name} needs Python {versions}: none is here.")
        print(f"Preparing {environment.name} in {folder} ...", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run(environment.name, [base, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run(environment.name, [*pip, "--no-deps", *environment.requirements])
        ready.touch()
    return python


@contextmanager
def _alone(cache: Path, name: str) -> Iterator[None]:
    """One process at a time prepares an environment; the others wait for it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    except OSError as error:
        raise PreparationError(f"The cache {cache} cannot be used ({error.strerror}).") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise PreparationError(
            f"{name} could not be installed within {INSTALL_PATIENCE:g} s."
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (said or done.stderr.splitlines() or ["no reason given"])[-1]
        raise PreparationError(f"{name} could not be installed ({reason.strip()}).")
