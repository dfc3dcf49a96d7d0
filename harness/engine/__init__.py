"""The engine: one decoder that runs plans, in batches whose rows may differ in prompts, edits and adapters."""
