"""Ours against the forward work, the reference, and peers."""
