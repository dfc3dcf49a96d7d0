"""One run over many processes and machines: a driver plans and writes records, workers hold models and answer shards."""
