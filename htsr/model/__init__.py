"""Models as lazily read, named tensors, and the reading of their names."""
