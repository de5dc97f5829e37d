"""Closed loop: models trained on what methods select, compared on queries that selected nothing."""
