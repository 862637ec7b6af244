"""clover-vllm: Clover-2 speculative decoding with real tree verification for vLLM."""

__version__ = "0.1.0"
