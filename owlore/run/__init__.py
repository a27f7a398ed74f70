"""A run from its settings to its files: inputs, trainer, training and export, result."""
