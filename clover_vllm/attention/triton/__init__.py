"""Tree verification in Triton, on vLLM's paged key/value cache: attention, moving accepted rows, the walk.

All arguments are device tensors or Python constants, and nothing waits for the device, so every call can be captured
in a CUDA graph. `reference` has the same functions in plain PyTorch. Importing the kernels needs Triton.
"""
