"""An encoder-decoder with cross-attention, and dates for it to write in digits."""
