"""Influence to training data: the pool's documents, their ranking, the choice among them, the data files."""
