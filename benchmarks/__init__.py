"""Ratios against named peers and the machine's limits; see README.md of this folder."""
