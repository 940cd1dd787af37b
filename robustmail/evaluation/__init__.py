"""Robust accuracy: named attacks with their settings, survivors only, and intervals."""
