"""Train stage 8: dropout, and the sizes of nanoGPT. `config` is for an accelerator."""

from examples.lecture.stages import DROPOUT_AND_SCALE, DROPOUT_AND_SCALE_ON_CPU

config = DROPOUT_AND_SCALE
cpu_config = DROPOUT_AND_SCALE_ON_CPU
