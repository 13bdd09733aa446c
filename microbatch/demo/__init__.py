"""The bundled catalogue and what `microbatch demo` does with it."""
