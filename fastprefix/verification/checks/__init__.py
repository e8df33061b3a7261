"""What the child process runs: calls of each cell, the error rule, the timing of buckets."""
