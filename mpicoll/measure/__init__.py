"""Timing of collectives side by side: tasks, test data, contestants, timing, the machine, and metrics."""
