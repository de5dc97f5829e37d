"""H and its inverse: K-FAC as the preconditioner, its sketches, and a solve with the Gauss–Newton matrix."""
