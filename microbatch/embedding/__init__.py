"""Embeddings: texts of concurrent callers travel in one call and get their vectors by index."""
