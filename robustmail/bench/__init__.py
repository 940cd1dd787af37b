"""Measurements of speed, for `robustmail bench`: training, evaluation, growth with size, and the plan for a GPU."""
