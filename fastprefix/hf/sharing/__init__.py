"""Prompts that rows share, computed once: blocks around a user's own forwards, log-probabilities, and TRL's trainers.

A prompt runs through the model by itself, and every row reads its keys and values as a prefix. Prompts may themselves
stand behind a prompt that several of them share; each level of such a tree is one forward. Where no cache is returned,
prompts and rows run as one text instead, and attention takes it apart (``hidden_states``). A search for a prompt of
tokens runs its candidates so (``hard_prompt_search``).
"""
