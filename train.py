"""Train a config's model: python train.py --config configs/shakespeare.py [--key=value ...]."""

import sys

from jaxgpt.cli.commands import exit_on_error, train

if __name__ == "__main__":
    with exit_on_error():
        sys.exit(train(sys.argv[1:]))
