"""An HTTP service over a fitted run: one query at a time, answered from memory."""
