"""Measuring one call of the operator: random inputs, other implementations, correctness, lower bounds and times."""
