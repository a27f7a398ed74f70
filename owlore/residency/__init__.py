"""Where frozen blocks live and in which format: store, device buffers, order of visits, streaming."""
