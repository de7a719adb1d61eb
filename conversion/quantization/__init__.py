"""Quantizes a 16-bit GenieBlue and its base."""
