"""The files that a run reads and writes: checkpoints, exports, metrics, trackers."""
