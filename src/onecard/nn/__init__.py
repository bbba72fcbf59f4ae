"""Models for one device."""
