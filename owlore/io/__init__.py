"""Files that a run reads and writes: checkpoints, exports, metrics, trackers."""
