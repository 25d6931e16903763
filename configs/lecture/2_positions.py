"""The bigram, which now also knows the position: a learned vector for each."""

from examples.lecture.stages import POSITIONS

config = POSITIONS
