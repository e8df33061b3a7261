"""Trained parameters: the prefix's keys and values, however they are parameterised. Free of transformers."""
