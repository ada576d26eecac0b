"""What agent and server say to each other: no I/O, no arrays, no torch."""
