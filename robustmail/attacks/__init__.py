"""Attacks: two adapters over libraries (torchattacks, ART), and what neither has: a PGD that keeps a trace."""
