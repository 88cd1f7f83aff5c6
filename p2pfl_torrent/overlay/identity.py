"""A peer's identity: an Ed25519 key whose public half *is* the PeerId.

The key file holds what py-libp2p's ``save_identity`` writes: the protobuf ``PrivateKey`` of the
libp2p peer-id specification with the 32 byte seed as its data (36 bytes in all).
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path

import base58
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from p2pfl_torrent.core.errors import P2PFLError

SEED_BYTES = 32
_KEY_FILE_PREFIX = bytes.fromhex("08011220")  # PrivateKey{Type: Ed25519, Data: 32 bytes}
_PEER_ID_PREFIX = bytes.fromhex("002408011220")  # identity multihash of PublicKey{Ed25519}
_PEER_ID_BYTES = len(_PEER_ID_PREFIX) + 32
_MAX_PEER_ID_CHARS = 64  # an Ed25519 id has 52; base58 decoding is quadratic, so bound it first
STORED_BESIDE = ("chunks.sqlite", "genesis.json")  # in a state directory that a peer has used
_KEYS_KEPT = 4096  # decoding a PeerId costs about as much as checking a signature


class IdentityError(P2PFLError):
    """The key file cannot be used; the text says what to do about it."""


class Identity:
    """A signing key and the PeerId that belongs to it.

    Attributes:
        peer_id: base58 text of the identity multihash of the public key.
    """

    __slots__ = ("_key", "peer_id")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise IdentityError(f"an identity seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = SigningKey(seed)
        self.peer_id = base58.b58encode(_PEER_ID_PREFIX + bytes(self._key.verify_key)).decode()

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"

    @property
    def seed(self) -> bytes:
        """The secret: 32 bytes from which the whole key follows."""
        return bytes(self._key)

    def sign(self, message: bytes) -> bytes:
        """The 64 byte Ed25519 signature of ``message``."""
        return self._key.sign(message).signature

    @classmethod
    def ephemeral(cls, seed: bytes | None = None) -> Identity:
        """An identity that is never written down; the same ``seed`` gives the same identity."""
        return cls(secrets.token_bytes(SEED_BYTES) if seed is None else seed)

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """The identity kept at ``path``, made on first use.

        Raises:
            IdentityError: the file is damaged, readable by other users, or cannot be made; or it is
            gone from beside what its peer has stored.
        """
        file = Path(path)
        try:
            if not file.exists():
                _refuse_a_lost_key(file)
                _create(file, secrets.token_bytes(SEED_BYTES))
            return cls(_read_seed(file))
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, (FileExistsError, NotADirectoryError)):  # where a folder should be
                reason = f"{file.parent} is not a directory"
            raise IdentityError(
                f"The identity key {file} cannot be used ({reason}): give another state directory."
            ) from error


def _refuse_a_lost_key(file: Path) -> None:
    """What lies here was signed by another key: as a new peer it would go on in another's name."""
    if any((file.parent / name).exists() for name in STORED_BESIDE):
        raise IdentityError(
            f"The state directory {file.parent} has lost its {file.name}: restore it from a "
            "backup, or give another state directory to start as a new peer."
        )


def _create(file: Path, seed: bytes) -> None:
    """Writes the key beside its place and links it there: whole or not at all, first one wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(_KEY_FILE_PREFIX + seed)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(draft, file)
        except FileExistsError:
            return  # another process was first; its key is the one to use
    finally:
        draft.unlink()
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_seed(file: Path) -> bytes:
    with open(file, "rb") as source:
        mode = os.fstat(source.fileno()).st_mode
        content = source.read(len(_KEY_FILE_PREFIX) + SEED_BYTES + 1)
    if os.name == "posix" and mode & 0o077:
        raise IdentityError(
            f"The identity key {file} can be read by other users: run 'chmod 600 {file}', or, if "
            "someone may have copied it, start as a new peer with another state directory."
        )
    if len(content) != len(_KEY_FILE_PREFIX) + SEED_BYTES or not content.startswith(
        _KEY_FILE_PREFIX
    ):
        raise IdentityError(
            f"The identity key {file} is damaged: restore it from a backup, or start as a new peer "
            "with another state directory."
        )
    return content[len(_KEY_FILE_PREFIX) :]


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of ``peer_id`` made ``signature`` over ``message``; never raises.

    Only Ed25519 PeerIds can be checked, since only they carry their key; all others give False,
    and so does any text form of a PeerId but the canonical one.
    """
    key = _public_key(peer_id)
    if key is None:
        return False
    try:
        key.verify(message, signature)
    except (CryptoError, ValueError, TypeError):  # bad signature, bad length, not bytes
        return False
    return True


def is_peer_id(text: str) -> bool:
    """Whether ``text`` is the canonical base58 form of an Ed25519 PeerId."""
    return _public_key(text) is not None


@lru_cache(maxsize=_KEYS_KEPT)
def _public_key(peer_id: str) -> VerifyKey | None:
    if len(peer_id) > _MAX_PEER_ID_CHARS:
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:  # a character outside the alphabet, or outside ASCII
        return None
    if len(raw) != _PEER_ID_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        return None
    if base58.b58encode(raw).decode() != peer_id:  # the decoder ignores trailing blanks
        return None
    return VerifyKey(raw[len(_PEER_ID_PREFIX) :])
