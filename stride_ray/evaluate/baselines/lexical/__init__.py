"""Baselines that use the words only."""
