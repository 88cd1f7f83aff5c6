"""One libtorrent session: seeds its own update's torrent, and downloads everybody else's.

Plain TCP without encryption, version 1 torrents (SHA-1), files on disk. Listening, hashing the own
update and adding the torrents lie before the clock; dialling lies within it.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import libtorrent as lt

from benchmarks.systems.child import Task, digest_of, one_round, read_task, tell, told

PIECES = 20  # of an update, at least: as many as our chunks
SETTINGS = {
    # nothing but the addresses we give
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "allow_multiple_connections_per_ip": True,
    "in_enc_policy": 2,  # disabled
    "out_enc_policy": 2,
    # no limits that a default sets for home links
    "connections_limit": 1000,
    "connection_speed": 1000,  # dials a second
    "torrent_connect_boost": 255,
    "unchoke_slots_limit": -1,
    "active_downloads": -1,
    "active_seeds": -1,
    "active_limit": -1,
    "max_out_request_queue": 1500,
    "send_buffer_watermark": 4 << 20,
    "send_buffer_low_watermark": 256 << 10,
    "file_pool_size": 500,
}


def piece_size(size: int) -> int:
    """The power of two that gives about PIECES pieces."""
    return max(16 << 10, 1 << (max(1, size // PIECES) - 1).bit_length())


def own_torrent(file: Path) -> bytes:
    """The torrent of a file, with its hashes."""
    storage = lt.file_storage()
    lt.add_files(storage, str(file))
    torrent = lt.create_torrent(storage, piece_size(file.stat().st_size), lt.create_torrent.v1_only)
    lt.set_piece_hashes(torrent, str(file.parent))
    return bytes(lt.bencode(torrent.generate()))


class Session:
    """A session and its torrents, by the place of their owners."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._folder = Path(task.scratch)
        mine = self.file(task.place)
        os.link(task.update(task.place), mine)
        self._ip = f"127.0.0.{task.place + 2}"  # one each: libtorrent tells peers apart by it
        self._session = lt.session(
            {
                **SETTINGS,
                "listen_interfaces": f"{self._ip}:0",
                "outgoing_interfaces": self._ip,
                "alert_mask": lt.alert.category_t.status_notification
                | lt.alert.category_t.storage_notification,
            }
        )
        self.torrent = own_torrent(mine)
        self._handles: dict[int, lt.torrent_handle] = {}
        self._addresses: list[tuple[str, int]] = []

    def file(self, place: int) -> Path:
        return self._folder / self._task.update(place).name

    def address(self) -> tuple[str, int]:
        """Where it listens."""
        while not self._session.listen_port():
            self._session.wait_for_alert(1000)
            self._session.pop_alerts()
        return self._ip, self._session.listen_port()

    def add(self, torrents: list[bytes], addresses: list[tuple[str, int]]) -> None:
        """Take up everybody's torrents; no link is opened yet."""
        self._addresses = addresses
        for place, torrent in enumerate(torrents):
            params = lt.add_torrent_params()
            params.ti = lt.torrent_info(lt.bdecode(torrent))
            params.save_path = str(self._folder)
            params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
            if place == self._task.place:
                params.flags |= lt.torrent_flags.seed_mode
            self._handles[place] = self._session.add_torrent(params)
        checking = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
        while any(handle.status().state in checking for handle in self._handles.values()):
            self._session.wait_for_alert(100)
            self._session.pop_alerts()

    def fetch(self) -> None:
        """Dial, and return when everything is here."""
        for handle in self._handles.values():
            for neighbour in self._task.neighbours():
                handle.connect_peer(self._addresses[neighbour])
        missing = {place for place in self._handles if place != self._task.place}
        while missing:
            self._session.wait_for_alert(1000)
            alerts = self._session.pop_alerts()
            if any(isinstance(alert, lt.torrent_finished_alert) for alert in alerts):
                missing = {place for place in missing if not self._handles[place].is_seed()}

    def digest(self) -> str:
        for handle in self._handles.values():
            handle.flush_cache()
        written = 0
        while written < len(self._handles):
            self._session.wait_for_alert(1000)
            written += sum(
                isinstance(alert, lt.cache_flushed_alert) for alert in self._session.pop_alerts()
            )
        return digest_of(self.file(place) for place in range(self._task.peers))


def main(task: Task) -> None:
    session = Session(task)
    torrent = base64.b64encode(session.torrent).decode()
    tell(address=[*session.address(), torrent])
    everybody = json.loads(told())
    session.add(
        [base64.b64decode(torrent) for _, _, torrent in everybody],
        [(ip, port) for ip, port, _ in everybody],
    )
    tell(ready=True)
    one_round(session.fetch, session.digest)
    told()


if __name__ == "__main__":
    main(read_task())
