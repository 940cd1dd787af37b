"""Checkpoints of any origin: read without running their code, diagnosed, and loaded into networks."""

from robustmail.checkpoints.checkpoint import Checkpoint, open_checkpoint
from robustmail.checkpoints.file_formats import check_there, load_saved
from robustmail.checkpoints.infer.candidates import Reading, readings
from robustmail.checkpoints.inspection import Report, inspect
from robustmail.checkpoints.load import fit, make, normalisation_in

__all__ = [
    "Checkpoint",
    "Reading",
    "Report",
    "check_there",
    "fit",
    "inspect",
    "load_saved",
    "make",
    "normalisation_in",
    "open_checkpoint",
    "readings",
]
