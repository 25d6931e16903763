"""The quick start's network and data with six features of docs/menu.md, in fewer steps.

`learning_rate` and the schedule are the quick start's; only its length is cut. How many steps
reach the quick start's loss is not measured yet.
"""

from pathlib import Path

from jaxgpt.command_line import load

quick_start = load(str(Path(__file__).with_name("shakespeare.py")))
winners = {
    "position": "rope",
    "optimizer": "muon",
    "lr_schedule": "wsd",
    "zero_init_projections": True,
    "out_dir": "out/speedrun",
}

config = quick_start["config"].replace(**winners, max_iters=2500, lr_decay_iters=2500)
on_cpu = quick_start["on_cpu"].replace(**winners, max_iters=1000, lr_decay_iters=1000)
