"""clover-vllm: Clover-2 speculative decoding with real tree verification for vLLM."""

__version__ = "0.1.0"

PLUGIN = "clover_vllm.engine.plugin:register"
"""What vLLM calls, by the entry point of pyproject.toml."""
