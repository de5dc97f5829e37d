"""What ``stride_ray.select`` is made of: the pool's documents, their ranking, the choice among them, the data files."""
