"""Any Hugging Face causal language model: loading, splitting, per-example gradients at its sites."""
