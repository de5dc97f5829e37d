"""Fit of steering operators: sketches of the blocks' whitened gradients, or the forms of the paper."""
