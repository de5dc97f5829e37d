"""Queries to ranked tables of influence: directions, responses, recovery, exact rescoring."""
