"""htsr: how heavy-tailed a transformer's layers are."""

__version__ = "0.1.0"
