"""A package of its own name: older releases of ART install a `tests`, too, and a folder would lose to it."""
