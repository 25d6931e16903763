"""Independent references the tests compare jaxgpt with: written from the papers, free of JAX."""
