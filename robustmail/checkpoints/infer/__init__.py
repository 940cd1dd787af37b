"""Which network do these tensors belong to? Candidates read off names and shapes.

This package is used through the names below. registered.py knows our networks and timm's, residual.py residual
networks, sequential.py chains of layers; prices.py says how likely each of their assumptions is; search.py ranks all
candidates and keeps those that load strictly and run.
"""

from robustmail.checkpoints.infer.registered import build_named, class_counts, convert_names, stem_channels
from robustmail.checkpoints.infer.search import Candidate, candidates

__all__ = ["Candidate", "build_named", "candidates", "class_counts", "convert_names", "stem_channels"]
