"""The first stage: the vector of a token, 32 numbers, is mapped to the odds of the next token."""

from examples.lecture.stages import BIGRAM

config = BIGRAM
