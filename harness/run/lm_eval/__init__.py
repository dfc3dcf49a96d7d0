"""lm-eval under a method: its model, and the contexts and users it asks with."""
