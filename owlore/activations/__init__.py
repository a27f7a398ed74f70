"""What a step keeps for backward on the device: checkpointing, saved-tensor arena, malloc_trim, compilation."""
