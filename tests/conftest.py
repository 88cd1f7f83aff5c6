"""What every test shares: the same chance on every machine, and hypothesis without a clock."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# Machines under load are slow, and a slow example is no wrong one, so hypothesis keeps no deadline.
# In CI it draws the same examples each time: a red run is then about the change, not about luck.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# A shell starts what it puts in the background (`make test &`) with Ctrl-C ignored, and so would be
# the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
