"""Caches of answers, and the guard around them."""
