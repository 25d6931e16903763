"""Train stage 5: a small ReLU network after the heads, at each position separately."""

from examples.lecture.stages import FEED_FORWARD

config = FEED_FORWARD
