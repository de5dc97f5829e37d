"""What really happens when a model is trained again: benchmarks, recipes, retraining results, LDS."""
