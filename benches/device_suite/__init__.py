"""What ``python -m benches.device`` runs: a plan of checks and timings, each row on disk as soon as it is measured."""
