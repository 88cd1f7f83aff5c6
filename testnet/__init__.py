"""Fleets of peers in processes, network namespaces and containers. May import `p2pfl_torrent`."""
