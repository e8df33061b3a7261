"""What transformers calls in an attached model: the attention function, mask functions and position ids."""
