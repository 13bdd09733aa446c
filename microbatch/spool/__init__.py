"""Requests that can wait without anybody waiting for them, and survive whoever dies on the way."""
