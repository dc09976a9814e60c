"""Comparison with exact results of the original framework: `python -m tests.parity FOLDER`."""
