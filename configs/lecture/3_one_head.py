"""Train stage 3: one head of self-attention, 32 wide, whose output replaces the token's vector."""

from examples.lecture.stages import ONE_HEAD

config = ONE_HEAD
