"""Provider batches: files of requests that the provider answers within a day at a lower price."""
