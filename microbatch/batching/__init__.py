"""The engine: admission, lanes, scheduling, calls, fallback. It imports no vendor."""
