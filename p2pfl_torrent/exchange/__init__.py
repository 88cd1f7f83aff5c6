"""The shells that drive the core's machines with trio; they know no socket, file or library."""
