"""Operators: the reference in plain PyTorch, and the native library."""
