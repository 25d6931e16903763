"""Define the study of docs/speedrun.md: the speedrun's recipe, and what each of its parts gains.

Used by `jaxgpt ablate --config configs/ablate_speedrun.py`. The baseline is the quick start's
config for a CPU; n_layer and n_embd set the size of both.
"""

from configs.shakespeare import cpu_config as quick_start
from configs.speedrun import cpu_config as speedrun

study = {
    "out_dir": "out/ablate_speedrun",
    "max_iters": 400,
    "lr_decay_iters": 0,  # every run has a schedule of its own length
    "eval_interval": 100_000,  # evaluate only at the end, on the whole validation split
    "eval_iters": 1,
    "log_interval": 50,
}

baseline = quick_start.replace(**study)
config = speedrun.replace(**study)
