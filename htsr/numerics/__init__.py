"""Pure functions on arrays: spectra, power-law fits, outliers, metrics. No files, no configuration, no logging."""
