"""From texts and conversations to token ids: tokenizers, chat templates at a fixed time, loss masks."""
