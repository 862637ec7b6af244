"""Drafting inside the engine."""
