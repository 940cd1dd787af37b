"""Secrets in what is about to leave this machine: tokens, keys and passwords."""

from __future__ import annotations

import os
import re

__all__ = ["find_secret"]

_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # letters of a variable's value that is no accident
_FORMS = {
    "a token of the Hugging Face hub": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\w+://[^\s/:@\"']+:[^\s/@\"']+@",
    "a password on a command line": r"--(?:token|password|secret|api-key)[ =]\S+",
}


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds, in words; None where none is seen. The secret itself is not in the words."""
    for kind, form in _FORMS.items():
        if re.search(form, text):
            return kind
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= _SHORTEST and value in text:
            return f"the value of the environment variable {name}"
    return None
