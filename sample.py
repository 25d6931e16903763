"""Stream samples of a run: python sample.py --out_dir=out/shakespeare [--start=TEXT ...]."""

import sys

from jaxgpt.cli.commands import exit_on_error, sample

if __name__ == "__main__":
    with exit_on_error():
        sys.exit(sample(sys.argv[1:]))
