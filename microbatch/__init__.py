"""Request-coalescing microbatcher for LLM APIs."""
