"""The training engine: it knows strategies, never methods by name."""
