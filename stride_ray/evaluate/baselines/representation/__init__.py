"""Baselines that compare representations: a model's states, or an encoder's embeddings."""
