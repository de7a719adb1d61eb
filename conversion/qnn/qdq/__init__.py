"""Quantization of graphs: ranges, encodings, QDQ files."""
