"""Retraining as ground truth: benchmarks, training recipes, retraining results, LDS."""
