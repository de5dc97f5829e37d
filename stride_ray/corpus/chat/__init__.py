"""Chat templates: conversations to text with marked targets, at a fixed time."""
