"""Training of a prefix or a soft prompt with transformers' Trainer: what ``fastprefix train`` runs."""

from fastprefix.train.checkpointing import checkpoint_layers

__all__ = ["checkpoint_layers"]
