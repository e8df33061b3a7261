"""Installed in transformers: the attention and mask interfaces, positions, attach and detach, save and load."""
