"""Whatever happens to a swarm: once it is left in peace, all that live agree on exactly those."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from p2pfl_torrent.core.genesis import TopologyTerms
from p2pfl_torrent.core.peers import PeerId
from tests.core.member_network import MemberNetwork, Node, mesh, star

NAMES = "abcdefg"
PEACE = 120.0  # seconds in which every swarm must have come to rest
names = st.sampled_from(NAMES)


class Chaos(RuleBasedStateMachine):
    """Seven members; some are killed, frozen, restarted, cut off, and packets get lost."""

    network: MemberNetwork

    @initialize(
        topology=st.sampled_from([star, mesh]),
        seed=st.integers(0, 1 << 16),
        loss=st.sampled_from([0.0, 0.1, 0.3]),
    )
    def begin(self, topology: Callable[[], TopologyTerms], seed: int, loss: float) -> None:
        self.network = MemberNetwork(NAMES, topology(), seed=seed)
        self.network.enter_all()
        self.network.run(15, until=lambda: self.network.agree_on(NAMES))
        self.network.loss = loss
        self.network.round(1)
        self.round = 1
        self.left: set[str] = set()

    def _node(self, name: str) -> Node:
        return self.network.nodes[PeerId(name)]

    @rule(seconds=st.sampled_from([0.3, 1.5, 6.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.network.run(seconds)

    @rule()
    def next_round(self) -> None:
        self.round += 1
        self.network.round(self.round)

    @rule(name=names)
    def kill(self, name: str) -> None:
        if self._node(name).runs:
            self.network.kill(name)

    @rule(name=names)
    def freeze(self, name: str) -> None:
        self.network.freeze(name)

    @rule(name=names)
    def thaw(self, name: str) -> None:
        self.network.thaw(name)

    @rule(name=names)
    def leave(self, name: str) -> None:
        if self._node(name).runs and name not in self.left:
            self.left.add(name)
            self.network.leave(name)
            self.network.kill(name)

    @rule(name=names, through=names)
    def restart(self, name: str, through: str) -> None:
        door = self._node(through)
        if self._node(name).killed and door.runs and through not in self.left and not self._cut():
            self.left.discard(name)
            self.network.start(PeerId(name))
            self.network.enter(name, through, self.round + 1)

    @rule(lonely=st.sets(names, max_size=5))
    def cut(self, lonely: set[str]) -> None:
        self.network.cut("".join(sorted(lonely)))

    @precondition(lambda self: self._cut())
    @rule()
    def heal(self) -> None:
        self.network.heal()

    def _cut(self) -> bool:
        return bool(self.network.side)

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        network = self.network
        network.heal()
        network.loss = 0.0
        for name in NAMES:
            network.thaw(name)
        alive = "".join(n for n in NAMES if not self._node(n).killed)
        before = network.messages
        if alive:
            network.run(PEACE, until=lambda: network.agree_on(alive))
            network.run(30)
            assert network.agree_on(alive)
            assert len({node.machine.digest() for node in network.running()}) == 1
            for node in network.running():
                assert not node.machine.suspected()
        assert network.messages - before < 100 * len(NAMES)
        assert network.largest < 16_384  # what one gossip message may carry


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
