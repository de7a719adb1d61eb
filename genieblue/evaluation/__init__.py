"""Evaluation: answers on held-out data, scored by sample and by task."""
