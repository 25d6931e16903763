"""Train stage 2: the bigram model, with a learned vector per position."""

from examples.lecture.stages import POSITIONS

config = POSITIONS
