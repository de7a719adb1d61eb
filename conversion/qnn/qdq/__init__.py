"""Graphs quantized: ranges, encodings, QDQ files."""
