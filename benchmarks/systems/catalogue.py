"""Which systems there are, what each needs, and which of our figures it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.systems.child import DIALLED, OPEN
from benchmarks.systems.environments import Environment

LIBTORRENT = Environment("libtorrent", ("libtorrent==2.1.1",), (11, 12, 10, 13))

P2PFL = Environment(
    "p2pfl",
    # Without its requirements Ray, matplotlib and gRPC's compiler, which a node runs without.
    tuple(
        """
        p2pfl==0.4.4 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0
        certifi==2026.10.19.post1 charset-normalizer==3.5.2 datasets==2.15.0 Deprecated==1.3.1
        dill==0.3.7 filelock==4.2.12 frozenlist==1.8.0 fsspec==2023.10.0 grpcio==1.85.3
        huggingface-hub==0.25.2 idna==3.20 multidict==7.2.1 multiprocess==0.70.15 numpy==1.26.4
        opendp==0.16.0 packaging==26.3 pandas==2.3.3 propcache==0.5.4 protobuf==7.36.2
        psutil==5.9.8 pyarrow==17.0.0 pyarrow-hotfix==0.7 python-dateutil==2.9.0.post0
        pytz==2026.6 PyYAML==6.0.4 requests==2.34.2 six==1.17.0 tqdm==4.70.1
        typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0 wrapt==2.5.2 xxhash==4.1.0
        yarl==1.25.1
        """.split()
    ),
    (11, 12),
)


@dataclass(frozen=True, slots=True)
class System:
    """One system.

    Attributes:
        module: what its processes run, with these arguments after the task.
        environment: None for ours.
        servers: processes beside the peers.
        rounds: what each lap of it consists of: rounds whose links are open or dialled.
        gathers: whether it ends with everybody's updates, and not only with their average.
        patience: seconds for one lap, with start and end.
        counterpart: our figure that has the same in the clock; empty for ours.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Environment | None = None
    servers: int = 0
    rounds: tuple[str, ...] = (OPEN,)
    gathers: bool = True
    patience: float = 180.0
    counterpart: str = "seconds_open"


OURS = "ours"

SYSTEMS = {
    system.name: system
    for system in (
        System(
            OURS,
            "ours",
            rounds=(DIALLED, OPEN),
            gathers=False,
            patience=600.0,
            counterpart="",
        ),
        System(
            "libtorrent",
            "libtorrent_session",
            environment=LIBTORRENT,
            rounds=(DIALLED,),
            counterpart="seconds",
        ),
        System("gloo", "gloo"),
        System(
            "p2pfl",
            "p2pfl_node",
            environment=P2PFL,
            gathers=False,
            patience=400.0,
            counterpart="seconds_merged",
        ),
        System("central", "central", servers=1, gathers=False, counterpart="seconds_merged"),
        System("tcp", "sockets", ("tcp",)),
        System("ssl", "sockets", ("ssl",)),
    )
}

DEFAULT = ("ours", "libtorrent", "gloo", "p2pfl", "central")
