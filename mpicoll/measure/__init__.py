"""Collectives timed side by side: what is measured, on which data, by whom, and what the numbers are worth."""
