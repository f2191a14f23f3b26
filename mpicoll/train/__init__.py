"""Distributed SGD: data, models, optimizers, strategies (how ranks agree), the loop, and the files they leave."""
