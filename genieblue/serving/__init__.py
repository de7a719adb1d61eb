"""Talking to a model: conversations with a cache by view."""
