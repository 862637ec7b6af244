"""The glue between clover-vllm and vLLM."""
