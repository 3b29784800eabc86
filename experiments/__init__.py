"""Thin Hydra entry points, one per thing that a person runs. No mathematics here."""
