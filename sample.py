"""python sample.py --out_dir=out/shakespeare [--start=TEXT ...]: streams samples of a run."""

from jaxgpt.cli.commands import run, sample

if __name__ == "__main__":
    run(sample)
