"""What the project exists for: lanes, combined prompts, demultiplexing, fallback. No vendor in here."""
