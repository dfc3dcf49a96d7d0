"""Benchmarks whose answers are long texts."""
