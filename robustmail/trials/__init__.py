"""Grids of training runs: recipes x settings x seeds, shared epochs, and statistics over seeds."""
