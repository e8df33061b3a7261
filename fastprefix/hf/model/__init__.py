"""What a model is: its attention layers, the modules around them, where its weights are and what wraps it."""
