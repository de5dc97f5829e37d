"""Baselines that compare representations: the model's hidden states, or an encoder's embeddings."""
