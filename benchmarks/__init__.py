"""Benchmarks, run by hand. Each prints a table and can write JSON with machine and versions."""
