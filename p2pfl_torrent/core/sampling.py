"""A set from which a random sample can be drawn in time that does not depend on its size."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class SampleSet(Generic[T]):
    """Add, discard and draw in O(1) each: a list of the members and each member's place in it."""

    __slots__ = ("_items", "_places")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._places: dict[T, int] = {}

    def add(self, item: T) -> None:
        """Add a member; no effect if it is one."""
        if item not in self._places:
            self._places[item] = len(self._items)
            self._items.append(item)

    def discard(self, item: T) -> None:
        """Remove a member; no effect if it is none."""
        place = self._places.pop(item, None)
        if place is None:
            return
        last = self._items.pop()
        if place < len(self._items):
            self._items[place] = last
            self._places[last] = place

    def sample(self, count: int, rng: random.Random) -> list[T]:
        """Up to ``count`` distinct members in random order."""
        return rng.sample(self._items, min(count, len(self._items)))

    def __contains__(self, item: T) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
