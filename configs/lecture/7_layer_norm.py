"""Train stage 7: layer norm before each branch and before the output layer."""

from examples.lecture.stages import LAYER_NORM

config = LAYER_NORM
