"""Distributed SGD: data, models, optimizers, strategies, the loop, and the files of a run."""
