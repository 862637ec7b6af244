"""A plugin of pytest that makes Triton's interpreter quicker; the environment has chosen it before pytest starts."""

from clover_vllm.launch.interpreter import quicken

quicken()
