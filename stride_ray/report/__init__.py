"""HTML reports: self-contained pages generated from tables on disk."""
