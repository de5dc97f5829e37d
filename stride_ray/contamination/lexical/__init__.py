"""The lexical channel: runs of equal normalised words, weighted by rarity, with their places in both texts."""
