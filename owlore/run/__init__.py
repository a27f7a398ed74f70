"""A whole run: inputs, assembly, lifecycle, and what is left behind."""
