"""Baselines based on per-example gradients."""
