"""Clover-2 on vLLM's V2 model runner, which keeps drafts, positions and lengths on the device: no step waits for it."""
