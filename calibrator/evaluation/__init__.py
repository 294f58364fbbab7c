"""Measures of a model: perplexity, recall, state norm, tasks of lm-evaluation-harness."""
