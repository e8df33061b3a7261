"""Networks that compute a prefix or a soft prompt from parameters of their own while it is trained."""
