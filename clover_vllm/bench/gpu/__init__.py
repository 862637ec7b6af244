"""Checks that need a GPU: `clover-vllm gpu-check`."""
