"""Masked rounds: READY messages become cells, cells become sums. Import its modules by name."""
