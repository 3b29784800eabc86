"""Models that this repository trains itself."""
