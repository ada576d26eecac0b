"""The protocol's version: one integer, bound into every hash, key derivation and signature."""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Two programs with different values never understand each other's signatures."""

DOMAIN_PREFIX: Final = f"sheepfold/v{PROTOCOL_VERSION}/"
"""Begins the name of every hash and the `info` of every key derivation."""
