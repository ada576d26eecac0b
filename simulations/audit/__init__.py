"""Audits: what a training, an update or a release betrays, found by attacking it."""
