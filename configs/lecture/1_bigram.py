"""Train stage 1: a vector of 32 numbers per token, mapped to the logits of the next token."""

from examples.lecture.stages import BIGRAM

config = BIGRAM
