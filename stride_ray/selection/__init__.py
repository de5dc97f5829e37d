"""Influence to training data: list the pool's documents, rank them, choose among them, write the data files."""
