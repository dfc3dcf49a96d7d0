"""Weights on disk: which model they are, GGUF files, and adapters of PEFT."""
