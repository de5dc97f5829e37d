"""The lexical channel: runs of equal normalised words, weighted by rarity, with their positions in both texts."""
