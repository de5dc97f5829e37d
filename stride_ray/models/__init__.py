"""Hugging Face causal language models: loading, splitting at a layer, and per-example gradients at their sites."""
