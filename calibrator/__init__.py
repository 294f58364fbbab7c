"""The model side: loads a checkpoint with stock transformers, tunes the scales of A and measures the result."""
