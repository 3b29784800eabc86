"""Texts and tokens: sources by name, and what packages on PyPI carry."""
