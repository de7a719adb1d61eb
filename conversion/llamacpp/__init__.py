"""Exports a GenieBlue for llama.cpp: an adapter, and a file for images, beside the untouched GGUF of its base."""
