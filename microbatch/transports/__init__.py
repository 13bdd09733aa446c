"""Ways to a model endpoint, and what is learned about it."""
