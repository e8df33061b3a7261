"""A sweep over every class of transformers that a tiny config builds: right, or refused when attached."""
