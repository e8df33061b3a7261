"""Trainable prefixes and soft prompts, their configurations and initial values. Does not import transformers."""
