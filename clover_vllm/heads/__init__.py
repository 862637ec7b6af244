"""Draft heads: configuration, reference model, checkpoints. No vLLM."""
