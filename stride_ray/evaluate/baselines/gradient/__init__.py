"""Baselines that compare per-example gradients."""
