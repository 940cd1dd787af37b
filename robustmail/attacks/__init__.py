"""Attacks: adapters for torchattacks and ART, AutoAttack at its reference settings, and PGDs that keep a trace."""
