"""A small ReLU network after the heads, at each position by itself."""

from examples.lecture.stages import FEED_FORWARD

config = FEED_FORWARD
