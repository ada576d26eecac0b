"""Experiments that come with Sheepfold, as TOML files."""
