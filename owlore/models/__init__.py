"""Models as they are loaded for training and as training left them."""
