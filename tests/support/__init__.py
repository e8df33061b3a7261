"""What several tests are made with: oracles, rules of error, tiny models, and ways to break things."""
