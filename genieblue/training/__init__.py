"""Training: chats in, batches, stages, a trainer."""
