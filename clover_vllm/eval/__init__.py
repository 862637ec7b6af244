"""How good a head is, without an engine."""
