"""onecard makes a large model fit and run fast on the one card, or the one CPU, that a person has."""

__version__ = "0.1.0"
