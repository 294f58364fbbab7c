"""Measures of a model: perplexity, passkey retrieval, spectrum and state norm."""
