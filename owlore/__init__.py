"""owlore: fine-tune a causal language model a few blocks at a time."""

__version__ = "0.1.0"
