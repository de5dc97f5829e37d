"""The command line: verbs and their options, and commands that span all stages (plan, status, quickstart)."""
