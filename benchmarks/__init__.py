"""Developers' benchmarks of the project itself: speed, scale, recall of shortlists, chaos, other tools."""
