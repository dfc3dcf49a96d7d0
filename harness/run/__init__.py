"""One run: a method on a task on a model, from the first batch to the last line of its record."""
