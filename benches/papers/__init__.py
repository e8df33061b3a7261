"""What papers claim about prefixes, run on a CPU: expected beside measured (``python -m benches.papers``)."""
