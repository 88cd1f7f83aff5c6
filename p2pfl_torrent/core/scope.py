"""Exchange modes: whose updates a peer takes, which chunks of them, and with what weight.

- ``swarm``: everyone takes every update whole: FedAvg (McMahan et al., AISTATS 2017), weights
  num_samples.
- ``neighbour``: a peer takes its overlay neighbours' updates whole: decentralised SGD (Lian et al.,
  NeurIPS 2017) with Metropolis weights, 1 / (1 + the larger degree) for a neighbour and the rest
  for itself (Xiao, Boyd, Kim 2007): doubly stochastic, so a round in which all comes keeps the mean
  over all peers. The weights of what did not come go to the others in proportion.
- ``fragment``: a peer takes a random share of the chunks of each neighbour's update, drawn anew
  for each (round, owner, chunk, receiver), so that a chunk reaches few and each peer another mix;
  per chunk the mean over those that came, weights num_samples. On a full overlay that is DivShare
  (de Vos et al., WWW 2025) but for its draw, which fixes how many receive a chunk and not each
  one's chance.

What a peer takes is a function of the genesis, the members and the round, so an owner knows what
another peer will ask of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pfl_torrent.core.bitfield import Bitfield
from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from p2pfl_torrent.core.topology import Neighbours, neighbours, overlay_seed

MODES = ("swarm", "neighbour", "fragment")
DRAWS = 1 << 64  # values that eight bytes of a hash may have
MAX_DRAWS = 1024  # kept: asked for again and again while a round lasts


@dataclass(frozen=True, slots=True)
class ScopeTerms:
    """What all peers agree on of the mode.

    Attributes:
        fragment_share: share of the chunks of an update that each receiver draws, above 0, up to 1.
        seed: of the swarm, which draws them and the overlay.
        num_chunks: of an update.
    """

    mode: str
    fragment_share: float
    seed: int
    topology: TopologyTerms
    num_chunks: int


class Scope:
    """One peer's part in the exchange, by the members that are here now.

    Args:
        members: in join order.
    """

    def __init__(self, terms: ScopeTerms, local: PeerId, members: Sequence[PeerId]) -> None:
        self.terms = terms
        self.local = local
        self._members = tuple(members)
        self._overlays: dict[int, Neighbours] = {}
        self._all = Bitfield.full(terms.num_chunks)  # handed out, never changed
        self._none = Bitfield(terms.num_chunks)
        self._draws: dict[tuple[PeerId, PeerId, int], Bitfield] = {}

    def with_members(self, members: Iterable[PeerId]) -> Scope:
        """The same peer's among other members."""
        return Scope(self.terms, self.local, tuple(members))

    def takes_from(self, owner: PeerId, round: int) -> bool:
        """Whether this peer takes anything of an owner's update of a round."""
        if self.terms.mode == "swarm" or owner == self.local:
            return True
        return owner in self._neighbours_of(self.local, round)

    def wanted(self, owner: PeerId, round: int) -> Bitfield:
        """Chunks that this peer takes of an owner's update."""
        return self.wanted_by(self.local, owner, round)

    def wanted_by(self, peer: PeerId, owner: PeerId, round: int) -> Bitfield:
        """Chunks that a peer takes of an owner's update; not to be changed."""
        if self.terms.mode == "swarm" or peer == owner:
            return self._all
        if owner not in self._neighbours_of(peer, round):
            return self._none
        if self.terms.mode == "neighbour":
            return self._all
        key = peer, owner, round
        if key not in self._draws:
            if len(self._draws) >= MAX_DRAWS:
                del self._draws[next(iter(self._draws))]
            self._draws[key] = self._drawn(peer, owner, round)
        return self._draws[key]

    def _drawn(self, peer: PeerId, owner: PeerId, round: int) -> Bitfield:
        chunks = self.terms.num_chunks
        start = hashlib.sha256(f"fragment {self.terms.seed} {round} {owner} {peer} ".encode())
        drawn = Bitfield(chunks)
        for chunk in range(chunks):
            draw = start.copy()
            draw.update(chunk.to_bytes(4, "big"))
            if int.from_bytes(draw.digest()[:8], "big") < self.terms.fragment_share * DRAWS:
                drawn.add(chunk)
        return drawn

    def weight(self, owner: PeerId, round: int, num_samples: int) -> float:
        """Weight of an owner's fresh update in this peer's average of a round."""
        if self.terms.mode != "neighbour":
            return float(num_samples)
        mine = self._neighbours_of(self.local, round)

        def metropolis(other: PeerId) -> float:
            degree = len(self._neighbours_of(other, round))
            return 1.0 / (1.0 + max(len(mine), degree))

        if owner != self.local:
            return metropolis(owner)
        return 1.0 - sum(metropolis(other) for other in sorted(mine))

    def _neighbours_of(self, peer: PeerId, round: int) -> frozenset[PeerId]:
        epoch = overlay_seed(self.terms.seed, self.terms.topology, round)
        overlay = self._overlays.get(epoch)
        if overlay is None:
            overlay = neighbours(self._members, self.terms.topology, epoch)
            self._overlays = {**dict(list(self._overlays.items())[-1:]), epoch: overlay}
        return overlay.get(peer, frozenset())
