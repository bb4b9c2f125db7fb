"""Fits of final losses: data-equivalence speedups, joint scaling laws, hyperparameter laws, noise."""
