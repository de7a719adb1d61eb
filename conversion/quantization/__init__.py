"""A 16-bit GenieBlue in, a quantized one and its base out."""
