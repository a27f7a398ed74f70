"""Where frozen blocks live and in which format: store, slots, visit plan, run."""
