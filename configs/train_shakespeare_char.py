"""nanoGPT's config of this name: the baby GPT of shakespeare.py, without its variant for a CPU."""

from pathlib import Path

from jaxgpt.cli.command_line import load

config = load(str(Path(__file__).with_name("shakespeare.py")))["config"]
config = config.replace(out_dir="out-shakespeare-char")
