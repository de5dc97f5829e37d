"""From documents and queries to token blocks: files, splits, readers, tokenization, packing, numbering."""
