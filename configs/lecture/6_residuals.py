"""Train stage 6: three blocks with residual connections; each branch ends in a linear map."""

from examples.lecture.stages import RESIDUALS

config = RESIDUALS
