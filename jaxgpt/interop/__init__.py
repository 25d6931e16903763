"""Open trained models, and read and write the weights of other projects."""
