"""OpenAI's files and batches, served by the simulated endpoint."""
