"""Which chunks of an update are there: one bit a chunk, most significant bit first (BEP 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from p2pfl_torrent.core.errors import RemoteProtocolError


class Bitfield:
    """A fixed number of bits with a running count of those set."""

    __slots__ = ("_bits", "_count", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        self._bits = bytearray((length + 7) // 8)
        self._count = 0

    @classmethod
    def full(cls, length: int) -> Bitfield:
        """Every bit set."""
        return cls.of(length, range(length))

    @classmethod
    def of(cls, length: int, indices: Iterable[int]) -> Bitfield:
        """These bits set."""
        field = cls(length)
        for index in indices:
            field.add(index)
        return field

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Bitfield:
        """Decode what a peer sent; a wrong length or a set spare bit is that peer's fault."""
        field = cls(length)
        if len(data) != len(field._bits):
            raise RemoteProtocolError(f"bitfield of {len(data)} bytes for {length} chunks")
        if length % 8 and data[-1] & (0xFF >> (length % 8)):
            raise RemoteProtocolError("bitfield with spare bits set")
        field._bits[:] = data
        field._count = int.from_bytes(data, "big").bit_count()
        return field

    def to_bytes(self) -> bytes:
        """The wire form, ``ceil(length / 8)`` bytes."""
        return bytes(self._bits)

    def add(self, index: int) -> bool:
        """Set a bit; True if it was not set before."""
        if index in self:
            return False
        self._bits[index >> 3] |= 0x80 >> (index & 7)
        self._count += 1
        return True

    def discard(self, index: int) -> bool:
        """Clear a bit; True if it was set before."""
        if index not in self:
            return False
        self._bits[index >> 3] &= ~(0x80 >> (index & 7))
        self._count -= 1
        return True

    def __contains__(self, index: int) -> bool:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return bool(self._bits[index >> 3] & (0x80 >> (index & 7)))

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(self._length) if index in self)

    def __len__(self) -> int:
        """Number of bits, set or not."""
        return self._length

    @property
    def count(self) -> int:
        """Number of bits set."""
        return self._count

    @property
    def complete(self) -> bool:
        """Whether every bit is set."""
        return self._count == self._length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitfield):
            return NotImplemented
        return self._length == other._length and self._bits == other._bits

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return "Bitfield('" + "".join("1" if i in self else "0" for i in range(self._length)) + "')"
