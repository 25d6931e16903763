"""One head of self-attention, 32 wide. Its output replaces the token's own vector."""

from examples.lecture.stages import ONE_HEAD

config = ONE_HEAD
