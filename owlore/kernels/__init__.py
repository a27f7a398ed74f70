"""Pure torch kernels: no configuration, no I/O, no model classes."""
