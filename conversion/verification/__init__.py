"""Proof that a saved model is what it says."""
