"""Trainable prefixes and soft prompts, their configurations and initial values, given or made of others. Does not import transformers."""
