"""Tree attention on vLLM's CPU key/value cache."""
