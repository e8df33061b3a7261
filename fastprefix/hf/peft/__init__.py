"""``patch``: PEFT's prompt-learning models, faster and right, with everything that is PEFT's left to PEFT."""
