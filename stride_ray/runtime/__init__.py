"""What every stage stands on: options, the run directory, storage, Ray tasks and the actor pool, costs."""
