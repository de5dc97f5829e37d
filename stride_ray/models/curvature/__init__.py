"""Curvature: the K-FAC preconditioner H, sketches of whitened gradients, and a Gauss–Newton solve."""
