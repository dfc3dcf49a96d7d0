"""Metrics, intervals, and comparisons of runs."""
