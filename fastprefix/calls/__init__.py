"""Calls of the operator: as the moment takes them, and two of them added through a gate."""
