"""Baselines that only read the words."""
