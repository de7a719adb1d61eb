"""Training: data, batches, stages and a trainer."""
