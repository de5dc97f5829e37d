"""Measurements of the project itself, which no user needs: speed, scale, recall of shortlists, chaos, other tools."""
