"""Files and servers that hold caches and spools."""
