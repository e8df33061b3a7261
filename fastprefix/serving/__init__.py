"""Prefixes in the engines that serve models.

Importing this package needs no engine.
"""
