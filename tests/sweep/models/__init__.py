"""Every class of transformers: which there are, a tiny model of each, and what it reads."""
