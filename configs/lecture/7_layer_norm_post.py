"""LayerNorm where the paper of 2017 has it: after each addition, and none at the end."""

from examples.lecture.stages import LAYER_NORM_POST

config = LAYER_NORM_POST
