"""The training engine: one step, one rotation, two backends, and the loop around them."""
