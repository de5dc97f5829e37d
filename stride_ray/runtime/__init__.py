"""Infrastructure of all stages: options, run directory, storage, Ray tasks, actor pool, cost accounting."""
