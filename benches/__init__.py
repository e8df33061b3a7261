"""Benchmarks: ``pytest benches`` for a developer's machine, ``python -m benches.device`` for a CUDA one."""
