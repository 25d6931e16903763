"""nanoGPT rebuilt in JAX and Flax for accelerator throughput."""

__version__ = "0.1.0"
