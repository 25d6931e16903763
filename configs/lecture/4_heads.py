"""Train stage 4: four heads of width 8, concatenated."""

from examples.lecture.stages import FOUR_HEADS

config = FOUR_HEADS
