"""The flags of `jaxgpt bench`; the comment at each field is the field's --help."""

from dataclasses import dataclass
from typing import Literal

from jaxgpt.config import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class BenchArgs:
    """Time jaxgpt, alone or in alternation with PyTorch nanoGPT."""

    # What to time: training steps, sampling, making batches, or the attention back ends.
    benchmark: Literal["train", "sample", "data", "attention"] = "train"
    # Measure a list of rows instead. Each is written to --json (by default bench-gpu.json) once it
    # is measured, and the same command continues after a stop. On a CPU the rows have toy sizes.
    suite: Literal["", "gpu"] = ""
    rows: str = ""  # Rows of the suite, separated by commas: names, or beginnings of names.
    # Seconds after which the suite starts no more rows; 0 is no limit.
    budget_s: NonNegativeInt = 0
    config: str = ""  # Config file to time instead of a preset.
    # cpu is nanoGPT's recipe for a laptop, baby its baby GPT; gpt2 and gpt2-xl need an accelerator
    # to train. Empty means cpu on a CPU and gpt2 on an accelerator.
    preset: Literal["", "cpu", "baby", "gpt2", "gpt2-xl"] = ""
    # Checkout of PyTorch nanoGPT to compare with, for --benchmark=train and --benchmark=sample.
    compare_to: str = ""
    torch_python: str = ""  # Python interpreter that has torch; empty means this one.
    # Whether nanoGPT runs eagerly, under torch.compile, or both in turn.
    compile: Literal["both", "eager", "compiled"] = "both"
    # Number of timed rounds per side, or of samples per measurement.
    repeats: PositiveInt = 5
    json: str = ""  # JSON file for all measurements, with every sample.
    # Picture of both sides' losses (.png, .svg, .pdf). Empty means beside the JSON file, or
    # bench.png.
    plot: str = ""
    # Picture of earlier results (.png, .svg, .pdf): time nothing, and draw --results and --out_dir.
    chart: str = ""
    results: tuple[str, ...] = ()  # JSON files of earlier comparisons, for --chart.
    out_dir: str = "out/shakespeare"  # Run whose losses --chart draws.
