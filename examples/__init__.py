"""Show models that use jaxgpt as a library; the package jaxgpt imports none of them."""
