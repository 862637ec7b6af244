"""Is it still the same? Torture, scripted drafts, tiny models."""
