"""The combined prompt (wire format 1): composing it, taking the reply apart, judging how a call ended."""
