"""Files of the Hugging Face hub, through huggingface_hub and its cache; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE count.

A file of weights is downloaded, and config.json beside it; nothing else is, and nothing that is downloaded is run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robustmail.checkpoints.weight_files import CONFIG, USUAL, only_weights
from robustmail.errors import ModelError, did_you_mean, in_brief

__all__ = ["HubFile", "download", "is_hub"]

_FORM = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+?))?(?:@(?P<revision>[\w./-]+))?/?")
_TODO = "Write hf://OWNER/NAME, hf://OWNER/NAME/FILE or hf://OWNER/NAME/FILE@REVISION."


@dataclass(frozen=True)
class HubFile:
    """A downloaded file. path: in the cache. repo: OWNER/NAME. file: its path in the repository. commit: its hash."""

    path: Path
    repo: str
    file: str
    commit: str

    @property
    def reference(self) -> str:
        """What opens the same file again: hf://OWNER/NAME/FILE@COMMIT."""
        return f"hf://{self.repo}/{self.file}@{self.commit}"


def is_hub(text: str | Path) -> bool:
    """Whether it names a file of the hub; a Path has lost one of the two slashes."""
    return str(text).startswith(("hf://", "hf:/"))


def download(text: str | Path) -> HubFile:
    """Download a file of weights, or take it from the cache, and config.json beside it, if there is one.

    text: hf://OWNER/NAME/FILE@REVISION; without a revision the newest is taken, without a file the repository's only
    file of weights. Raises ModelError: another form, no network, no such repository, revision or file, no access, or
    several files of weights.
    """
    match = _FORM.fullmatch(str(text))
    if match is None:
        raise ModelError(str(text), "not a file of the hub", _TODO)
    repo, revision = match["repo"], match["revision"]
    from huggingface_hub import hf_hub_download

    with _told(str(text), repo, match["file"], revision):
        file, revision = (match["file"], revision) if match["file"] else _only_file(repo, revision)
        path = Path(hf_hub_download(repo, file, revision=revision))
        # The folder of a snapshot is named by its commit.
        found = HubFile(path, repo, file, path.parts[-1 - len(Path(file).parts)])
        _download_config(found)
    return found


def _only_file(repo: str, revision: str | None) -> tuple[str, str | None]:
    """(the only file of weights in a repository, the commit that has it); offline, a usual one in the cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, revision=revision)
    except HfHubHTTPError:
        raise
    except Exception:  # no network, in whatever words the HTTP library has for it
        for name in USUAL:
            if isinstance(try_to_load_from_cache(repo, name, revision=revision or "main"), str):
                return name, revision
        raise
    names = [sibling.rfilename for sibling in info.siblings or []]
    return only_weights(names, f"hf://{repo}", f"hf://{repo}/{{}}@{revision or info.sha}"), info.sha


def _download_config(found: HubFile) -> None:
    """Have config.json beside the file in the cache, if the repository has it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    name = (Path(found.file).parent / CONFIG).as_posix()
    if try_to_load_from_cache(found.repo, name, revision=found.commit) is None:  # neither there nor known to be absent
        with (
            contextlib.suppress(EntryNotFoundError),
            _without_bars(),
        ):  # also if it is not there and there is no network
            hf_hub_download(found.repo, name, revision=found.commit)


@contextlib.contextmanager
def _told(text: str, repo: str, file: str | None, revision: str | None) -> Iterator[None]:
    """Tell what huggingface_hub raises in one line (ModelError)."""
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login`."
    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        todo = f"Ask for it at {constants.ENDPOINT}/{repo}, and {login}"
        raise ModelError(text, "gated: its owner has to give you access", todo) from error
    except errors.RepositoryNotFoundError as error:
        wrong = f"{constants.ENDPOINT} has no model {repo}, or does not show it to you"
        raise ModelError(text, wrong, f"If it is private, {login}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(text, f"{repo} has no revision {revision}", _TODO) from error
    except errors.LocalEntryNotFoundError as error:
        wrong = f"is not in the cache ({constants.HF_HUB_CACHE}), and {_no_network()}"
        raise ModelError(text, wrong, "Check the network, or copy the file there.") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(text, f"{repo} has no file {file}", _near(repo, file or "", revision)) from error
    except errors.HFValidationError as error:
        raise ModelError(text, f"not a file of the hub ({in_brief(error)})", _TODO) from error
    except Exception as error:  # of the HTTP library or the file system
        wrong = f"cannot be downloaded: {_no_network()} ({in_brief(error)})"
        raise ModelError(text, wrong, "Check the network, HF_ENDPOINT and HF_HOME.") from error


def _no_network() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"


def _near(repo: str, file: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return did_you_mean(file, HfApi().list_repo_files(repo, revision=revision))
    except Exception:  # the first error is the one to tell
        return ""
