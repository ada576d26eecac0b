"""Filters and robust means: one mean update that a few hostile units cannot steer."""
