"""Ends a process of a demo when the demo is gone, even if that was killed and could end nobody.

Such a process has a pipe as its standard input whose other end the demo alone holds: the system
closes it whatever becomes of the demo. ``PR_SET_PDEATHSIG`` would be Linux's alone, and fires when
the starting *thread* ends; looking for a new parent time and again would be late, and can be wrong
where the parent was gone before the first look.
"""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "P2PFL_TORRENT_ENDS_WITH_STDIN"
GRACE = 10.0  # seconds to leave in order; then there is nobody to kill what hangs but itself


def end_with_parent() -> None:
    """From now on end as after SIGTERM once standard input ends, where the parent asked for it."""
    if os.environ.pop(VARIABLE, None) is not None:  # not for what this process starts itself
        threading.Thread(target=_outlive_nobody, name="parent", daemon=True).start()


def _outlive_nobody() -> None:
    while os.read(0, 4096):  # below sys.stdin, whose lock would hold up the interpreter's end
        pass
    # To the main thread, which would sleep on if another one took the signal.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)
