"""What users attach to a model: building, placing and choosing prefixes, and blocks that choose for a batch."""
