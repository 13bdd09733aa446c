"""What caches and spools are kept in: files and servers, and how their failures are told."""
