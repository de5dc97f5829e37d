"""Rows of the input: what a row and a reject are, columnar files, and which columns of a row make a document."""
