"""Arithmetic that the network calls, made faster; each has a plain twin in the tests."""
