"""The sans-IO core: every decision of a peer, as pure functions and state machines.

Nothing here opens a file or a socket, reads a clock, draws a random number of its own or holds
a key. Time (``now: float``, seconds on any monotonic clock), chance (``random.Random``) and
signing are handed in.
"""
