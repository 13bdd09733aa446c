"""The cache of answers to similar questions: guards, index, evidence, and its place in the batcher."""
