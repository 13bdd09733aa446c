"""Durable queues of requests, and the workers that answer them."""
