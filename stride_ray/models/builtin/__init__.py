"""Small models of our own: a toy language model to train on the spot, and classifiers in its interface."""
