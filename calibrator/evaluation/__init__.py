"""Measures of a model: perplexity, recall, memory before and after, state norm."""
