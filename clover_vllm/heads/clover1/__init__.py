"""Clover (arXiv 2405.00263), the predecessor of Clover-2."""
