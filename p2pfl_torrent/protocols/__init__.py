"""One module per libp2p protocol: bounded framing. May import `core` and `exchange`."""
