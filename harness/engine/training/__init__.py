"""Training of many users in one batch."""
