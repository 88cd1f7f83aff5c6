"""What is measured, and how; prints tables, writes JSON. May import `p2pfl_torrent`, `testnet`."""
