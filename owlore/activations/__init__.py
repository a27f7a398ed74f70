"""What a step keeps for backward on the device: checkpointing, a saved-tensor arena, heap trimming, compilation."""
