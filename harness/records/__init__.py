"""What a run leaves behind: run.json and samples.jsonl, and how they are found."""
