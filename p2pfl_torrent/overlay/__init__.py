"""The overlay: a host others can reach, connections to peers, streams over them, and gossip."""

import logging

# py-libp2p logs every broken connection as an error, and logging prints those of loggers without a
# handler; who wants them adds a handler to "libp2p".
logging.getLogger("libp2p").addHandler(logging.NullHandler())
