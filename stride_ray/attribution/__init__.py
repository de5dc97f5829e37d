"""Queries to ranked influence tables: query directions, responses, recovery, exact rescoring."""
