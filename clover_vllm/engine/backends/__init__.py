"""Attention backends that verify trees."""
