from __future__ import annotations

import os
import stat
from pathlib import Path

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.identity_utils import load_identity, save_identity
from libp2p.peer.id import ID

from p2pfl_torrent.overlay.identity import Identity, IdentityError, is_peer_id, verify

SEED = bytes(range(32))


def test_the_first_use_makes_the_key_and_the_next_one_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.key"
    made = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_that_start_at_once_agree_on_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "identity.key"
    other = Identity.load_or_create(path)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as seen just before the other's link
    assert Identity.load_or_create(path).peer_id == other.peer_id
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match="can be read by other users: run 'chmod 600"):
        Identity.load_or_create(path)


@pytest.mark.parametrize(
    "content", [b"", b"short", bytes(36), bytes.fromhex("08011220") + bytes(33)]
)
def test_a_damaged_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="is damaged: restore it"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_directory_in_its_place_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"cannot be used \(Is a directory\)"):
        Identity.load_or_create(tmp_path)


def test_a_file_in_its_directorys_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    for path in (tmp_path / "state" / "identity.key", tmp_path / "state" / "a" / "identity.key"):
        with pytest.raises(IdentityError, match=rf"\({path.parent} is not a directory\)"):
            Identity.load_or_create(path)


@pytest.mark.parametrize("stored", ["chunks.sqlite", "genesis.json"])
def test_a_key_that_is_gone_from_its_store_is_not_replaced(tmp_path: Path, stored: str) -> None:
    (tmp_path / stored).write_text("")
    with pytest.raises(
        IdentityError, match=r"has lost its identity\.key: restore it from a backup"
    ):
        Identity.load_or_create(tmp_path / "identity.key")
    assert [path.name for path in tmp_path.iterdir()] == [stored]


def test_the_file_is_py_libp2ps(tmp_path: Path) -> None:
    ours = tmp_path / "ours.key"
    identity = Identity.load_or_create(ours)
    assert str(ID.from_pubkey(load_identity(ours).public_key)) == identity.peer_id
    theirs = tmp_path / "theirs.key"
    keys = create_new_key_pair()
    save_identity(keys, theirs)
    assert Identity.load_or_create(theirs).peer_id == str(ID.from_pubkey(keys.public_key))


def test_a_seed_gives_the_peer_id_that_libp2p_gives_it() -> None:
    identity = Identity.ephemeral(SEED)
    assert identity.peer_id == str(ID.from_pubkey(create_new_key_pair(SEED).public_key))
    assert identity.peer_id == Identity.ephemeral(SEED).peer_id
    assert Identity.ephemeral().peer_id != Identity.ephemeral().peer_id
    with pytest.raises(IdentityError, match="32 bytes, not 3"):
        Identity.ephemeral(b"abc")


def test_what_one_signs_verifies_under_its_id_alone() -> None:
    one, other = Identity.ephemeral(SEED), Identity.ephemeral()
    signature = one.sign(b"message")
    assert verify(one.peer_id, b"message", signature)
    assert not verify(one.peer_id, b"massage", signature)
    assert not verify(other.peer_id, b"message", signature)
    assert not verify(one.peer_id, b"message", signature[:-1])
    assert not verify(one.peer_id, b"message", b"")


@given(st.text(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_is_false_and_never_raises(peer_id: str, message: bytes, signature: bytes) -> None:
    assert not verify(peer_id, message, signature)
    assert not verify(Identity.ephemeral(SEED).peer_id, message, signature)


@given(st.binary(max_size=60))
def test_only_ed25519_ids_are_peer_ids(raw: bytes) -> None:
    text = base58.b58encode(raw).decode()
    assert is_peer_id(text) == (len(raw) == 38 and raw.startswith(bytes.fromhex("002408011220")))


def test_a_peer_id_has_one_text_form() -> None:
    peer_id = Identity.ephemeral(SEED).peer_id
    assert is_peer_id(peer_id)
    assert not is_peer_id(peer_id + " ")
    assert not is_peer_id(peer_id + "\n")
    assert not is_peer_id("1" + peer_id)


def test_the_secret_is_not_shown() -> None:
    identity = Identity.ephemeral(SEED)
    assert repr(identity) == f"<Identity {identity.peer_id}>"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(IdentityError, match="Permission denied"):
        Identity.load_or_create(tmp_path / "identity.key")
