"""Provide independent references for the tests, written from the papers and without JAX."""
