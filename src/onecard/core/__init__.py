"""Facts, no behaviour, no torch."""
