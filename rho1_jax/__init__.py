"""Selective Language Modeling (Rho-1, arXiv 2404.07965) in JAX."""
