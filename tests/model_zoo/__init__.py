"""Tiny random models of every architecture, as tables that tests and the documentation read."""
