"""`clover-vllm gpu-check`: the code for GPUs, on one. Speed here; whether tokens stay the same in `check`."""
