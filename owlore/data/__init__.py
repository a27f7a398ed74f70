"""Rows in, micro-batches out: formats -> templates -> tokenise -> batches, with a report in between."""
