"""Run `python -m jaxgpt`."""

from jaxgpt.cli.commands import main

main()
