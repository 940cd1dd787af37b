"""Files of the Hugging Face hub, through huggingface_hub and its cache; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE count.

A file of weights is downloaded, and config.json beside it; nothing else is, and nothing that is downloaded is run.
Files are uploaded in one commit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from robustmail.checkpoints.weight_files import CONFIG, USUAL, only_weights
from robustmail.errors import ModelError, did_you_mean, in_brief

__all__ = ["HubFile", "download", "hub_address", "is_hub", "repository_files", "repository_of", "upload"]

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


def hub_address(text: str | Path) -> tuple[str, str | None, str | None]:
    """(OWNER/NAME, FILE, REVISION) of hf://OWNER/NAME/FILE@REVISION. Raises ModelError: another form."""
    match = _FORM.fullmatch(str(text))
    if match is None:
        raise ModelError(str(text), "not a file of the hub", _TODO)
    return match["repo"], match["file"], match["revision"]


def download(text: str | Path) -> HubFile:
    """Download a file of weights, or take it from the cache, and config.json beside it, if there is one.

    text: hf://OWNER/NAME/FILE@REVISION; without a revision the newest is taken, without a file the repository's only
    file of weights. Raises ModelError: another form, no network, no such repository, revision or file, no access, or
    several files of weights.
    """
    repo, file, revision = hub_address(text)
    from huggingface_hub import hf_hub_download

    with _hub_errors(str(text), repo, revision):
        is_pinned = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
        names = None if is_pinned and file and _is_cached(repo, file, revision) else _files(repo, revision)
        if names is None:  # from the cache
            file = file or next((name for name in USUAL if _is_cached(repo, name, revision)), USUAL[0])
        elif file is None:
            at = f"@{revision}" if revision else ""
            file = only_weights(names, str(text), lambda name: f"hf://{repo}/{name}{at}")
        elif file not in names:
            raise ModelError(str(text), f"{repo} has no file {file}", did_you_mean(file, names))
        path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=names is None))
        # The folder of a snapshot is named by its commit.
        found = HubFile(path, repo, file, path.parts[-1 - len(Path(file).parts)])
        if (config := (Path(file).parent / CONFIG).as_posix()) in (names or ()):
            hf_hub_download(repo, config, revision=found.commit)
    return found


def repository_of(text: str) -> str:
    """OWNER/NAME of hf://OWNER/NAME. Raises ModelError: another form."""
    match = _FORM.fullmatch(text)
    if match is None or match["file"] or match["revision"]:
        raise ModelError(text, "not a repository of the hub", "Write hf://OWNER/NAME.")
    return match["repo"]


def repository_files(repo: str) -> list[str] | None:
    """The files that a repository holds; None where there is no such repository yet.

    Raises ModelError: the hub does not answer, or gives no access.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with _hub_errors(f"hf://{repo}", repo, None, "reached at"):
        try:
            return [sibling.rfilename for sibling in HfApi().model_info(repo).siblings or []]
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None


def upload(repo: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
    """Upload files in one commit, into a repository that is made if it is not there; returns the commit's address.

    repo: OWNER/NAME. files: name in the repository -> file or content; other files there stay. private: for a new
    repository.
    Raises ModelError: not logged in, no access, no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _hub_errors(f"hf://{repo}", repo, None, "uploaded to"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def _files(repo: str, revision: str | None) -> list[str] | None:
    """The files of a repository; None without a network. Raises what huggingface_hub does where the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, revision=revision)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception:  # in whatever words the HTTP library has for it
        return None
    return [sibling.rfilename for sibling in info.siblings or []]


def _is_cached(repo: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=revision or "main"), str)


@contextlib.contextmanager
def _hub_errors(text: str, repo: str, revision: str | None, done: str = "downloaded from") -> Iterator[None]:
    """Tell what huggingface_hub raises in one line (ModelError). done: what failed, before the hub's address."""
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
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        wrong = f"is not in the cache ({constants.HF_HUB_CACHE}), and {reason}"
        raise ModelError(text, wrong, "Check the network, or copy the file there.") from error
    except ValueError as error:  # a name that the hub does not allow
        raise ModelError(text, f"not a file of the hub ({in_brief(error)})", _TODO) from error
    except Exception as error:  # of the HTTP library or the file system
        refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
        wrong = f"cannot be {done} {constants.ENDPOINT} ({in_brief(error)})"
        todo = f"You have no right to: {login}" if refused else "Check the network, HF_ENDPOINT and HF_HOME."
        raise ModelError(text, wrong, todo) from error
