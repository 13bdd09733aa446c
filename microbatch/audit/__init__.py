"""The disagreement that combining causes: evidence, decisions on the size of batches, comparison of answers. Pure."""
