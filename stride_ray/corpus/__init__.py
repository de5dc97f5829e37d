"""From documents and queries to token blocks: files, splits, readers, tokenizing, packing, numbering."""
