"""JSON Schema of one answer: from Python types and `response_format`, to strict mode, validation and decoding."""
