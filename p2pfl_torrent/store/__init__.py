"""Chunks, manifests and checkpoints on disk: SQLite and files. May import `core` alone."""
