"""Contamination scans measured: leaks that are planted or labelled, and the rules of other scanners."""
