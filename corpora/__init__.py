"""Where text comes from and how it becomes token rows: documents, detokenizers, tokenizers."""
