"""Pages that people look at: self-contained HTML from tables that are already on disk."""
