"""Heads as vLLM models."""
