"""zstd frames (RFC 8878) whose content has a size that both sides know.

The package `zstandard` is an extra: it is imported when a swarm uses it, not before;
the configuration says so where it is missing.
"""

from __future__ import annotations

from p2pfl_torrent.core.errors import RemoteProtocolError


def largest_frame(size: int) -> int:
    """Most bytes of a frame around so much content: zstd's own bound, and 64 more."""
    return size + (size >> 8) + 128


def pack(content: bytes, level: int) -> bytes:
    """A frame that declares its content's size; the same for the same content and library."""
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(content)


def unpack(frame: bytes | memoryview, size: int) -> bytes:
    """The content of a frame, exactly ``size`` bytes, which is all the memory that it can take.

    Raises:
        RemoteProtocolError: it declares another size, holds another, is cut short, damaged, or
            followed by anything.
    """
    import zstandard

    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if declared != size:
            raise RemoteProtocolError(f"a zstd frame of {declared} bytes in place of {size}")
        # In one go into a buffer of the declared size: no window is kept, nothing goes past it.
        content = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"a damaged zstd frame ({error})") from error
    if len(content) != size:
        raise RemoteProtocolError(f"a zstd frame with {len(content)} bytes in place of {size}")
    return content
