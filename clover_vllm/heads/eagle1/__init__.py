"""EAGLE-1, the baseline that vLLM can serve itself."""
