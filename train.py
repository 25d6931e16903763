"""python train.py --config configs/shakespeare.py [--key=value ...]: trains the GPT of a config."""

from jaxgpt.cli.commands import run, train

if __name__ == "__main__":
    run(train)
