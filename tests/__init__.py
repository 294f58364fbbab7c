"""Tests: each builds small real models or files and runs the real code on them."""
