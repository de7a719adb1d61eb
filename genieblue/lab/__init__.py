"""The training structures that the paper compares."""
