"""The structures that the paper compares."""
