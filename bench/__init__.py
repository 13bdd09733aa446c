"""What microbatch costs and saves, measured side by side with what one would use instead: `python -m bench`."""
