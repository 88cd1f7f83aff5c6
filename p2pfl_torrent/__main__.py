"""``python -m p2pfl_torrent`` is the console script ``p2pfl-torrent``."""

import sys

from p2pfl_torrent.cli import main

if __name__ == "__main__":
    sys.exit(main())
