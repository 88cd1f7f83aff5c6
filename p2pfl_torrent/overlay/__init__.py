"""The overlay: a host others can reach, connections to peers, streams over them, and gossip."""
