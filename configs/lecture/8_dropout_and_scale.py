"""The last stage: dropout, and sizes as in nanoGPT. `config` is for an accelerator."""

from examples.lecture.stages import DROPOUT_AND_SCALE, DROPOUT_AND_SCALE_ON_CPU

config = DROPOUT_AND_SCALE
cpu_config = DROPOUT_AND_SCALE_ON_CPU
