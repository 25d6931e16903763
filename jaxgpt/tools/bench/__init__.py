"""`jaxgpt bench`."""
