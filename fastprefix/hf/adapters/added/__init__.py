"""What is added to the content's attention instead of standing in front of the content: LLaMA-Adapter's prompts."""
