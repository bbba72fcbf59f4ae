"""Calibration text, statistics, and the walk over blocks."""
