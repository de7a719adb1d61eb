"""Verifies saved models."""
