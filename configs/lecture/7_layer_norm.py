"""LayerNorm before each branch and before the output layer."""

from examples.lecture.stages import LAYER_NORM

config = LAYER_NORM
