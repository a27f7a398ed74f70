"""From data files to micro-batches: formats -> templates -> tokenise -> batches, with a report in between."""
