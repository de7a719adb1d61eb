"""The folder that an export leaves, and what runs it."""
