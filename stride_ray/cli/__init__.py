"""The command line: its verbs, their options, and what looks over all stages (plan, status, quickstart)."""
