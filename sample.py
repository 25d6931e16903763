"""Stream samples of a run: python sample.py --out_dir=out/shakespeare [--start=TEXT ...]."""

from jaxgpt.cli.commands import run, sample

if __name__ == "__main__":
    run(sample)
