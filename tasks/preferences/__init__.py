"""Benchmarks that ask whether what a user said before is kept to."""
