"""Likelihoods of texts: bounds without Monte Carlo, and exact ones of samplers."""
