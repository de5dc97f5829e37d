"""Recovery of influence from responses of subsets: one Lasso per query, over a matrix that is never stored."""
