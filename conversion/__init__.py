"""Converts models: creates, verifies, quantizes and exports a GenieBlue."""
