"""Files of others, fetched where a task or a metric needs them."""
