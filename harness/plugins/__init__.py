"""Strangers' methods and tasks come in here: found by name, built from options, and what they give back checked."""
