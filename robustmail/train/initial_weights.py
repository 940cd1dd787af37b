"""The weights of a file as the initial weights of a recipe's model."""

from __future__ import annotations

import hashlib

from torch import nn

from robustmail.checkpoints import (
    Checkpoint,
    check_exists,
    convert_names,
    find_weights,
    load_tensors,
    open_checkpoint,
)
from robustmail.errors import ModelError, RobustmailError
from robustmail.models.classifier import Classifier
from robustmail.models.timm_model import is_in_timm

__all__ = ["init_sha256", "load_initial", "open_initial"]


def open_initial(init: str) -> Checkpoint:
    """The file that a recipe's `init` names, read without running code that is in it.

    Raises a RobustmailError: no such file, or none with weights that can be used.
    """
    try:
        source = find_weights(init)
        check_exists(source.path)
        return open_checkpoint(source.path)
    except RobustmailError as error:
        raise type(error)(f"init={init}", error.wrong, error.todo) from error


def init_sha256(init: str) -> str | None:
    """The SHA-256 of the file that `init` names; None where it is not there any more."""
    try:
        with open(find_weights(init).path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (RobustmailError, OSError):
        return None


def load_initial(model: Classifier, checkpoint: Checkpoint, init: str, network: object) -> str:
    """Load a file's tensors into a model, and say in a line what was loaded.

    All but the head has to fit. The head, the last linear layer, stays as it is where the file has another number of
    classes. The model's own normalisation stays.
    init, network: the fields `init` and `model` of the recipe. Raises ModelError, which names the tensors.
    """
    who, head, was_training = f"init={init}", _head(model.net), model.training
    try:
        _, notes = load_tensors(checkpoint.raw_tensors, model.net, who, head=head)
    except ModelError as error:
        is_named = isinstance(network, str) and is_in_timm(network)
        renamed = convert_names(str(network), checkpoint.tensors, model.net) if is_named else {}
        todo = "" if "--ignore-unused" in error.todo else error.todo
        if not renamed:
            raise ModelError(error.who, error.wrong, todo) from error
        _, notes = load_tensors(renamed, model.net, who, head=head)
    model.train(was_training)
    read = [f"weights {checkpoint.weights}"] if checkpoint.weights else []
    return "; ".join([f"starts from {init} (SHA-256 {checkpoint.sha256[:16]})", *read, *notes])


def _head(network: nn.Module) -> tuple[str, ...]:
    """The names of the head's parameters: of what timm calls the classifier, or else of the last linear layer."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    layers = [layer for layer in (found if isinstance(found, tuple) else (found,)) if isinstance(layer, nn.Module)]
    own = {id(p) for layer in layers for p in layer.parameters()}
    if not own:
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        own = {id(p) for p in linear[-1].parameters()} if linear else set()
    return tuple(name for name, p in network.named_parameters() if id(p) in own)
