"""Bytes and seconds of a run before it starts, from the configuration of the model alone."""
