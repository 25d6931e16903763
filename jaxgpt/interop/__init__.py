"""Read and write the weights of other projects."""
