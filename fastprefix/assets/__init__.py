"""Real weights and real text for the demo and the tests: a small language model and a few WordNet glosses."""
