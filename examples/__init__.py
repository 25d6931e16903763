"""Models that are built on jaxgpt from the outside. The package itself imports none of them."""
