"""Three blocks on a residual stream; each branch ends in a linear map."""

from examples.lecture.stages import RESIDUALS

config = RESIDUALS
