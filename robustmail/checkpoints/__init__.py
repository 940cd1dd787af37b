"""Checkpoints of any origin: read without running their code, diagnosed, and loaded into networks."""

from robustmail.checkpoints.checkpoint import Checkpoint, open_checkpoint
from robustmail.checkpoints.file_formats import check_exists, load_saved, save
from robustmail.checkpoints.infer import Candidate, candidates, convert_names
from robustmail.checkpoints.inspection import Inspection, inspect_checkpoint
from robustmail.checkpoints.load import build_network, fits, load_strict, load_tensors, normalisation_in
from robustmail.checkpoints.source import WeightsSource, find_weights

__all__ = [
    "Checkpoint",
    "Candidate",
    "Inspection",
    "WeightsSource",
    "check_exists",
    "convert_names",
    "fits",
    "find_weights",
    "load_strict",
    "load_tensors",
    "inspect_checkpoint",
    "load_saved",
    "build_network",
    "normalisation_in",
    "open_checkpoint",
    "save",
    "candidates",
]
