"""Trainable prefixes and soft prompts, their configurations, and initial values, given or made of other prefixes.

Does not import transformers.
"""
