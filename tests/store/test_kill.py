"""A kill -9 at any instant loses no verified block and no finished round.

A child process works like a peer, printing what it has done; it is killed in the middle, and
whatever it had printed must be there when its state is opened again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from p2pfl_torrent.core.tensors import model_hash
from p2pfl_torrent.store import Checkpoints
from tests.core.small_models import finite_arrays
from tests.store.test_updates import CHUNKS, LAYOUT, SOURCE, Update, files_in, opened

ROOT = Path(__file__).parents[2]


def say(what: str, *details: object) -> None:
    os.write(1, json.dumps([what, *details]).encode() + b"\n")  # whole or not at all


def work(state: Path) -> None:
    """Rounds of three owners, block by block, for ever."""
    with opened(state) as store:
        checkpoints = Checkpoints(state, LAYOUT.spec)
        last = store.last_round()
        round = last[0] + 1 if last else 1
        while True:
            say("pruned", [update.hex() for update in store.prune(round)])
            updates = [Update(owner, round) for owner in "abc"]
            for update in updates:
                store.put_manifest(update.manifest)
                say("manifest", update.id.hex())
                for chunk in range(CHUNKS):
                    for block in range(update.manifest.entries[chunk].num_blocks):
                        offset, size = update.manifest.block_range(
                            chunk, block, 1, LAYOUT.block_size
                        )
                        data = update.files[chunk][offset : offset + size]
                        store.write(update.id, chunk, offset, data)
                        say("block", update.id.hex(), chunk, block)
                    store.complete_chunk(update.id, chunk, SOURCE)
            arrays = finite_arrays(LAYOUT.spec, round)
            checkpoints.save(round, arrays)
            counted = [update.id for update in updates]
            store.finish_round(round, "complete", model_hash(LAYOUT.spec, arrays), b"{}", counted)
            say("round", round)
            checkpoints.prune(2)
            round += 1


def killed_after(state: Path, lines: int) -> list[Any]:
    """Everything the child said it had done before it was killed."""
    command = "import sys; from pathlib import Path; from tests.store.test_kill import work;"
    with subprocess.Popen(
        [sys.executable, "-c", command + "work(Path(sys.argv[1]))", str(state)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()  # what it did until the signal took effect
    assert child.returncode == -signal.SIGKILL
    return [json.loads(line) for line in said]


@pytest.mark.parametrize("start", range(3))
def test_nothing_that_was_done_is_lost(tmp_path: Path, start: int) -> None:
    blocks: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    manifests: set[str] = set()
    finished = 0
    for lines in (1 + start, 37 + 11 * start, 153 - 5 * start):
        for what, *details in killed_after(tmp_path, lines):
            if what == "pruned":
                manifests -= set(details[0])
            elif what == "manifest":
                manifests.add(details[0])
            elif what == "block":
                blocks[details[0]].add((details[1], details[2]))
            else:
                finished = details[0]
        with opened(tmp_path) as store:
            known = {manifest.update.hex(): manifest for manifest in store.manifests()}
            # Between the last word and the kill: one more manifest, or one more pruning.
            forgotten = manifests - known.keys()
            assert len(known.keys() - manifests) <= 1
            assert len(forgotten) in (0, 3)
            manifests = set(known)
            assert files_in(tmp_path) <= known.keys()
            for update in known:
                found = {
                    (chunk, block)
                    for chunk in range(CHUNKS)
                    for block in store.verified_blocks(known[update].update, chunk)
                }
                assert blocks[update] <= found
                blocks[update] = found
            last = store.last_round()
            assert (last[0] if last else 0) in (finished, finished + 1)
            if last:
                finished = last[0]
                checkpoints = Checkpoints(tmp_path, LAYOUT.spec)
                checkpoints.load(finished, last[1])
                counted = [u for u, r in store.counted().items() if r == finished]
                assert len(counted) == 3
    assert finished > 1
