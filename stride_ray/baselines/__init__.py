"""Other ways to score training blocks for queries, one file each, all of one form (``problem.Method``)."""
