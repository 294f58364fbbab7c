"""Measures of a model: perplexity, recall, and memory before and after."""
