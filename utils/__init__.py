"""Plumbing of the training framework: configuration, processes, optimisation, checkpoints, evaluation."""
