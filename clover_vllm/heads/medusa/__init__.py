"""Medusa (arXiv 2401.10774): heads that each predict one depth, whatever stands between."""
