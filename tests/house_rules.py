"""The import rule of the house, read from the source's syntax tree.

`p2pfl_torrent` is built in rooms (CONTRIBUTING.md). `ROOMS` says what each may touch: which other
rooms, which third-party packages, and whether files, clocks, randomness and logging are open to
it. An import counts wherever it stands: inside a function and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "p2pfl_torrent"
NAMES_THAT_SAY_NOTHING = frozenset(
    {"common", "helper", "helpers", "manager", "managers", "util", "utils"}
)
RUNS_WHAT_IT_READS = frozenset(
    {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
)

# What a room without files, clocks, randomness and logging may take from the standard library.
PURE_STDLIB = frozenset(
    """
    __future__ abc array base64 binascii bisect collections contextlib copy dataclasses decimal
    difflib enum fractions functools graphlib hashlib heapq hmac io ipaddress itertools json math
    numbers operator random re statistics string struct sys textwrap types typing unicodedata
    weakref zlib
    """.split()
)
PURE_SAFETENSORS = frozenset({"safetensors", "safetensors.numpy"})
PURE_NUMPY_RANDOM = frozenset(
    {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}
)
FILE_FUNCTIONS_OF = {
    "io": {"FileIO", "open", "open_code"},
    "networkx": {"read_*", "write_*"},
    "numpy": {"fromfile", "genfromtxt", "load", "loadtxt", "save*"},
    "safetensors": {"safe_open"},
    "safetensors.numpy": {"load_file", "save_file"},
    "sys": {"stderr", "stdin", "stdout"},
}


@dataclass(frozen=True)
class Room:
    """What the modules of one room may import: rooms below, third-party packages, stdlib."""

    rooms: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    pure: bool = False  # sans-IO: PURE_STDLIB alone, and none of the IO hidden in pure packages


def room(rooms: str = "", packages: str = "", *, pure: bool = False) -> Room:
    """A Room from space-separated names."""
    return Room(frozenset(rooms.split()), frozenset(packages.split()), pure)


TRIO = "trio outcome exceptiongroup"
BELOW_PEER = "config core exchange learning overlay protocols runlog statistics store"

ROOMS = {
    "core": room(packages="numpy networkx safetensors msgspec zstandard", pure=True),
    "store": room("core", "numpy safetensors msgspec"),
    "exchange": room("core", f"{TRIO} numpy msgspec"),
    "protocols": room("core exchange", f"{TRIO} libp2p multiaddr msgspec numpy"),
    "overlay": room(
        "core exchange", f"{TRIO} libp2p multiaddr base58 nacl cryptography noise google msgspec"
    ),  # base58 to google are what libp2p itself builds keys, handshakes and messages from
    # torch lives here alone
    "learning": room("core", "torch torchvision numpy safetensors msgspec sklearn"),
    "config": room("core", "yaml msgspec"),
    "statistics": room("core", "msgspec"),
    "runlog": room("core statistics", "msgspec"),
    "peer": room(BELOW_PEER, f"{TRIO} multiaddr numpy msgspec"),
    "progress": room("peer statistics", "rich"),
    "simulation": room("core config statistics", "numpy networkx msgspec"),
    "cli": room(
        "config core learning peer progress runlog simulation statistics __init__",
        f"{TRIO} rich msgspec numpy yaml",
    ),  # a user like any other: it trains with learning's models
    "__init__": room("config core peer statistics"),
    "__main__": room("cli"),
}


@dataclass(frozen=True)
class Violation:
    """One broken rule, printed as file:line: what."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Import:
    """One imported name, made absolute: `from .a import b` in p2pfl_torrent.core is core.a, b."""

    line: int
    module: str
    name: str | None  # None for `import module`
    bound_as: str
    climbs: int = 0  # how many packages up a relative import starts


def package_violations(root: Path, rooms: dict[str, Room] = ROOMS) -> list[Violation]:
    """Every violation of the import rule in root/p2pfl_torrent, in order of file and line."""
    found: list[Violation] = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        where = path.relative_to(root).as_posix()
        name = parts[0]
        if name not in rooms:
            what = f"{PACKAGE}.{name} is not a room: add it to ROOMS, with what it may import"
            found.append(Violation(where, 1, what))
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        containing = (PACKAGE, *parts[:-1])
        for line, what in _room_violations(tree, containing, name, rooms):
            found.append(Violation(where, line, what))
    return sorted(found, key=lambda violation: (violation.path, violation.line))


def everywhere_violations(root: Path, folders: tuple[str, ...]) -> list[Violation]:
    """Names that say nothing, and code that runs what it reads, in any of the folders."""
    found: list[Violation] = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        relative = path.relative_to(root)
        where = relative.as_posix()
        for part in relative.with_suffix("").parts:
            if NAMES_THAT_SAY_NOTHING & set(part.lower().split("_")):
                found.append(Violation(where, 1, f"the name {part} says nothing of what is in it"))
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for line, what in _runs_what_it_reads(tree, relative.parent.parts):
            found.append(Violation(where, line, what))
    return found


def imports(tree: ast.AST, containing: tuple[str, ...]) -> Iterator[Import]:
    """All imports of a module that lies in the package `containing`, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                yield Import(node.lineno, alias.name, None, bound)
        elif isinstance(node, ast.ImportFrom):
            base = containing[: len(containing) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(node.lineno, module, alias.name, bound, max(0, node.level - 1))


def _room_violations(
    tree: ast.AST, containing: tuple[str, ...], name: str, rooms: dict[str, Room]
) -> Iterator[tuple[int, str]]:
    """(line, what) for each rule of its room that one module breaks."""
    allowed = rooms[name]
    found = list(imports(tree, containing))
    for item in found:
        top = item.module.split(".")[0]
        if top == PACKAGE:
            yield from _own_import(item, name, allowed, rooms, depth=len(containing))
        elif top in sys.stdlib_module_names:
            if top == "asyncio":
                yield item.line, f"{name} imports asyncio: this house runs on trio"
            elif allowed.pure and top not in PURE_STDLIB:
                yield item.line, f"{name} is sans-IO and may not import {item.module}"
        elif top not in allowed.packages:
            yield item.line, f"{name} may not import {item.module}"
        elif allowed.pure and top == "safetensors" and item.module not in PURE_SAFETENSORS:
            yield item.line, f"{name} may not import {item.module}: it brings its framework"
    yield from _hidden_imports(tree, name, allowed, rooms)
    if allowed.pure:
        yield from _impure_uses(tree, name, found)


def _own_import(
    item: Import, name: str, allowed: Room, rooms: dict[str, Room], *, depth: int
) -> Iterator[tuple[int, str]]:
    """Rules for imports of this very package: only rooms below, by their full names."""
    parts = item.module.split(".")
    if len(parts) > 1:
        target = parts[1]
    elif item.name in rooms:
        target = item.name
    else:
        target = "__init__"  # the facade, which imports peer and so everything
    if target == name:
        return
    if item.climbs:
        yield item.line, f"{name} leaves its room by a relative import: write {PACKAGE}.{target}"
    if target not in allowed.rooms:
        shown = PACKAGE if target == "__init__" else f"{PACKAGE}.{target}"
        yield item.line, f"{name} may not import {shown}"
    private = [part for part in (*parts[1:], item.name or "") if _is_private(part)]
    if private:
        yield item.line, f"{name} imports {private[0]}, which is private to {target}"


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def _hidden_imports(
    tree: ast.AST, name: str, allowed: Room, rooms: dict[str, Room]
) -> Iterator[tuple[int, str]]:
    """Imports that are no import statement: __import__, import_module, p2pfl_torrent.x.y."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called.split(".")[-1] in {"__import__", "import_module"}:
                yield node.lineno, f"{name} imports by {called}, where nobody can see it"
        elif isinstance(node, ast.Attribute):
            reached = dotted(node).split(".")
            is_ours = len(reached) == 2 and reached[0] == PACKAGE and reached[1] in rooms
            if is_ours and reached[1] != name and reached[1] not in allowed.rooms:
                yield node.lineno, f"{name} may not use {'.'.join(reached)}"


def _impure_uses(tree: ast.AST, name: str, found: list[Import]) -> Iterator[tuple[int, str]]:
    """IO and chance hidden in what a sans-IO room may import: open(), random.random(), np.load."""
    bound = {item.bound_as: _full_name(item) for item in found}
    for item in found:
        if item.name is not None and (reason := _impure(f"{item.module}.{item.name}")):
            yield item.line, f"{name} {reason}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = dotted(node).partition(".")
            if head in bound and (reason := _impure(f"{bound[head]}.{rest}")):
                yield node.lineno, f"{name} {reason}"
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            head, _, rest = called.partition(".")
            full = f"{bound.get(head, head)}.{rest}" if rest else bound.get(head, head)
            if full in {"open", "print", "input", "breakpoint", "numpy.memmap"}:
                yield node.lineno, f"{name} is sans-IO and calls {full}()"
            seedable = {"random.Random", "numpy.random.default_rng", "numpy.random.SeedSequence"}
            if full in seedable and not (node.args or node.keywords):
                yield node.lineno, f"{name} calls {full}() without a seed: chance is an argument"


def _impure(full: str) -> str | None:
    """Why a sans-IO room may not touch this dotted name, or None if it may."""
    module, _, last = full.rpartition(".")
    if module == "random" and last != "Random":
        return f"uses {full}: chance is an argument (random.Random)"
    if module == "numpy.random" and last not in PURE_NUMPY_RANDOM:
        return f"uses {full}: chance is an argument (numpy.random.Generator)"
    for pattern in FILE_FUNCTIONS_OF.get(module, ()):
        if last == pattern or (pattern.endswith("*") and last.startswith(pattern[:-1])):
            return f"is sans-IO and uses {full}"
    return None


def _runs_what_it_reads(tree: ast.AST, containing: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """pickle and its kin, torch.load, eval, exec: data must never become code."""
    found = list(imports(tree, containing))
    bound = {item.bound_as: _full_name(item) for item in found}
    for item in found:
        if item.module.split(".")[0] in RUNS_WHAT_IT_READS:
            yield item.line, f"imports {item.module}, which runs what it reads"
        elif _full_name(item) in {"torch.load", "torch.jit.load", "torch.serialization.load"}:
            yield item.line, f"imports {_full_name(item)}, which unpickles"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = dotted(node).partition(".")
            full = f"{bound.get(head, head)}.{rest}"
            if full in {"torch.load", "torch.jit.load", "torch.serialization.load"}:
                yield node.lineno, f"uses {full}, which unpickles"
            elif full in {"builtins.eval", "builtins.exec"}:
                yield node.lineno, f"uses {full}"
        elif isinstance(node, ast.Name) and node.id in {"eval", "exec"}:
            yield node.lineno, f"uses {node.id}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            forbidden = isinstance(node.value, ast.Constant) and node.value.value is False
            if not forbidden:
                yield node.value.lineno, "allows numpy to unpickle"


def _full_name(item: Import) -> str:
    if item.name is not None:
        return f"{item.module}.{item.name}"
    return item.module if item.bound_as != item.module.split(".")[0] else item.bound_as


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, or an empty string where the chain starts with something else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
