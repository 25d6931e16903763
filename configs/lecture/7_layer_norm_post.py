"""Train stage 7 as in the 2017 paper: layer norm after each addition, and none at the end."""

from examples.lecture.stages import LAYER_NORM_POST

config = LAYER_NORM_POST
