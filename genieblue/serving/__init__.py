"""Conversations with a model, with a KV cache per view."""
