"""What experiments share: data of tasks, small models and their training."""
