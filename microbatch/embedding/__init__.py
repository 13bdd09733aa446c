"""Embeddings: texts of concurrent callers are sent in one call, and vectors are matched to them by index."""
