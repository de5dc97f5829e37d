"""Blocks to steering operators: a sketch of each block's preconditioned gradient, or the paper's own forms."""
