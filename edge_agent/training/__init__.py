"""Local training of one round: the step engine and what it is made of."""
