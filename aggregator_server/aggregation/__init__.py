"""From cells' sums to one mean update."""
