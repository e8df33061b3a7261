"""What is added to the content's attention and does not stand in front of it: LLaMA-Adapter's prompts, memories."""
