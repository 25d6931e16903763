"""Train a config's model: python train.py --config configs/shakespeare.py [--key=value ...]."""

from jaxgpt.cli.commands import run, train

if __name__ == "__main__":
    run(train)
