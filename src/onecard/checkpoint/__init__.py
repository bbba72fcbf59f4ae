"""Model folders: read lazily, written by rename, journaled."""
