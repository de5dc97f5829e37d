"""Rows of evaluation sets in the schemas in use: which field is what, and how questions and answers are read."""
