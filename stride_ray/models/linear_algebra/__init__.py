"""Linear algebra for curvature and sketches: eigenbases, random projections, the vocabulary's coordinates."""
