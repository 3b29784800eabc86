"""The one door to the model hub: the commit that a revision is, files at a commit, and its errors in a sentence.

Everything is read from the local cache at a commit: what is there once needs no network (`HF_HUB_OFFLINE=1`).
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from tqdm import tqdm

from dass.errors import DassError, first_line, told

Kind = Literal["model", "dataset"]
T = TypeVar("T")

PATIENCE = (1, 2, 4, 8)
"""Seconds between the attempts while the hub answers with an error of its own (5xx)."""
MEMORY = 300
"""Seconds for which a hub that did not answer is not asked again: in a sweep it costs its time-out once."""
RESTARTS = 3
"""How often a download may begin anew where the server cannot go on in the middle."""
BESIDE = ["*.json", "*.jinja", "*.model", "tokenizer.model*", "*.txt", "*.md", "*.tiktoken", "*.spm", "*.bpe"]
BESIDE += ["*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "*[Nn][Oo][Tt][Ii][Cc][Ee]*", "COPYING*", "*USE_POLICY*", "*.vocab"]
"""What is fetched of a model beside its weights: neither pickles nor code."""
SUBFOLDERS = ["[!a]*/*"]
"""What is not: the same model in another format (`original/`, `onnx/`); `additional_chat_templates/` may come."""
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"

_down: dict[str, tuple[float, str]] = {}  # endpoint -> until when it is not asked again, and why


def commit_of(repository: str, revision: str | None, kind: Kind = "model") -> str:
    """The commit that a branch, a tag or nothing (the newest) stands for now; of a commit itself, without asking.

    Where the hub is out of reach it is the commit that the cache knows. DassError where there is none.
    """
    with _told(repository, revision, kind):
        return _Hub().resolve_revision(repository, repo_type=kind, revision=revision).resolved


def fetch(repository: str, file: str, revision: str | None, kind: Kind = "model") -> Path:
    """One file, in the cache; DassError where it cannot be had."""
    commit = commit_of(repository, revision, kind)
    get = partial(hf_hub_download, repository, file, repo_type=kind, revision=commit, tqdm_class=_Bar)
    with _told(repository, revision, kind):
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(get(local_files_only=True))
        _Hub().repo_info(repository, repo_type=kind, revision=commit)  # tells at once what is wrong
        return Path(_patiently(get))


def dataset_files(repository: str, revision: str | None) -> Path:
    """The folder in the cache with all files of a data set; DassError where it cannot be had."""
    return _snapshot(repository, revision, "dataset")


def model_files(repository: str, revision: str | None, weights: bool = True) -> Path:
    """The folder in the cache with a model's configuration and tokenizer, and its safetensors: no format twice.

    Raises:
        DassError: it cannot be had, or its weights are pickles, which may run code as they are read.
    """
    commit = commit_of(repository, revision)
    folder = _snapshot(repository, commit, allow_patterns=BESIDE, ignore_patterns=SUBFOLDERS)
    if not weights:
        return folder
    shards = {WEIGHTS}
    if (folder / INDEX).is_file():
        kinds = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
        with told(f"{INDEX} of the model {repository} is none", "choose another revision", *kinds):
            shards = set(map(str, json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    _snapshot(repository, commit, allow_patterns=sorted(shards))
    if lacking := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise DassError(_why_without_weights(repository, commit, lacking[0]))
    return folder


def _snapshot(repository: str, revision: str | None, kind: Kind = "model", **patterns: list[str]) -> Path:
    """The folder of a commit with the files of these patterns; what is whole in the cache is not asked for."""
    commit = commit_of(repository, revision, kind)
    get = partial(snapshot_download, repository, repo_type=kind, revision=commit, tqdm_class=_Bar, **patterns)
    with _told(repository, revision, kind):
        with contextlib.suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            get_cached_repo_tree(repository, repo_type=kind, revision=commit)  # else nobody knows what is lacking
            return Path(get(local_files_only=True))
        try:
            _Hub().repo_info(repository, repo_type=kind, revision=commit)
        except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            with contextlib.suppress(LocalEntryNotFoundError):
                return Path(get(local_files_only=True))  # as another program has left it, whole or not
            raise
        return Path(_patiently(get))


def _why_without_weights(repository: str, commit: str, lacking: str) -> str:
    try:
        names = [file.path for file in get_cached_repo_tree(repository, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return f"The cache lacks {lacking} of the model {repository}: fetch it where there is a network."
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if any(name.endswith(".safetensors") for name in names) or not pickles:
        return f"The model {repository} holds no weights {lacking} at {commit[:8]}: choose another model or revision."
    return (
        f"The model {repository} holds its weights only as pickles ({pickles[0]}), which may run code as they are "
        f"read: choose a revision with safetensors, or convert it."
    )


class _Hub(HfApi):
    """The hub, with a time-out, patience where it is in trouble, and the memory that it is down."""

    def repo_info(self, *arguments: Any, **named: Any) -> Any:
        """What the hub tells of a repository at a revision, its commit above all."""
        until, why = _down.get(constants.ENDPOINT, (0.0, ""))
        if time.monotonic() < until:
            raise httpx2.ConnectError(why)
        named = {**named, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
        try:
            return _patiently(partial(super().repo_info, *arguments, **named))
        except Exception as error:
            _remember(error)
            raise


def _remember(error: BaseException) -> None:
    """Keep in mind that the hub is down, where an error says so."""
    silent = isinstance(error, httpx2.ConnectError | httpx2.TimeoutException)
    known = time.monotonic() < _down.get(constants.ENDPOINT, (0.0, ""))[0]  # it is the memory that speaks
    if not known and (silent or (isinstance(error, HfHubHTTPError) and error.response.status_code >= 500)):
        _down[constants.ENDPOINT] = time.monotonic() + MEMORY, first_line(error)


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of the hub; where it is in trouble, once more after a while."""
    for seconds in PATIENCE:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            print(f"note: the hub answers {error.response.status_code}: again in {seconds} s", file=sys.stderr)
        time.sleep(seconds)
    return ask()


class _Bar(tqdm):
    """A bar of the bytes with the time left, in the place of the several bars of huggingface_hub, which show none."""

    def __init__(self, *arguments: Any, unit: str = "it", desc: str = "", total: int | None = None, **_: Any) -> None:
        shown = unit == "B" and not desc.startswith("Downloading bytes")  # those come twice, received and written
        ours = {"desc": "download", "disable": None if shown else True, "leave": False, "dynamic_ncols": True}
        super().__init__(*arguments, unit=unit, unit_scale=True, total=total, **ours)
        self._restarts = 0

    def set_description(self, *_: Any, **__: Any) -> None:
        """Close: huggingface_hub names the bar anew at the end, and leaves it open."""
        self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Move the bar; backwards where a download begins anew, which huggingface_hub would do for ever."""
        self._restarts += (n or 0) < 0
        if self._restarts > RESTARTS:
            raise OSError("it was cut short again and again")
        return super().update(n)


@contextlib.contextmanager
def _told(repository: str, revision: str | None, kind: Kind) -> Iterator[None]:
    """Tell in a sentence why something of the hub cannot be had."""
    try:
        yield
    except Exception as error:  # an address that is no hub can make it raise anything
        _remember(error.__cause__ or error)
        named = f"the {'data set' if kind == 'dataset' else kind} {repository}"
        raise DassError(_why(error, named, revision or "main")) from error


def _why(error: BaseException, named: str, revision: str) -> str:
    """The sentence for an error of the hub, by its class and status and never by its words."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    endpoint, gist = constants.ENDPOINT, first_line(chain[-1])
    answer = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
    if answer is not None:
        return _why_refused(answer, named, revision)
    if isinstance(error, HFValidationError):
        return f"There is no folder and, by its name, no page on the hub for {named}: give a folder or OWNER/NAME."
    absent = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain) or (absent and constants.is_offline_mode()):
        return f"The cache lacks {named} at {revision}, and HF_HUB_OFFLINE forbids the network: fetch it without."
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError) or (type(error) is OSError and not error.errno):
        return f"The download of {named} was cut short ({gist}): run it again."
    if absent or isinstance(error, httpx2.TransportError):
        return f"The cache lacks {named} at {revision}, and {endpoint} does not answer ({gist}): check the network."
    return f"Cannot fetch {named} from {endpoint} into {constants.HF_HUB_CACHE} ({gist}): check address and disk."


def _why_refused(answer: HfHubHTTPError, named: str, revision: str) -> str:
    """The sentence for an answer of the hub other than what was asked for."""
    status, endpoint = answer.response.status_code, constants.ENDPOINT
    if isinstance(answer, GatedRepoError) or (status == 403 and not isinstance(answer, DisabledRepoError)):
        return f"Access to {named} is gated: accept its licence on its hub page and log in with `hf auth login`."
    if status == 401 and "authorization" in answer.response.request.headers:
        return f"The hub refuses the token with which {named} was asked for (401): log in anew with `hf auth login`."
    if isinstance(answer, RevisionNotFoundError):
        return f"There is no revision {revision} of {named} on the hub: give a branch, a tag or a commit that it has."
    if isinstance(answer, RemoteEntryNotFoundError):
        file = answer.response.url.path.rsplit("/", 1)[-1]
        return f"There is no file {file} in {named} at {revision}: choose another revision."
    if isinstance(answer, RepositoryNotFoundError) or status == 404:
        return f"On {endpoint} is not {named}, or it is private: check the id, or log in with `hf auth login`."
    if status >= 500:
        return f"The hub {endpoint} is in trouble (it still answers {status}), and the cache lacks {named}: try later."
    return f"The hub {endpoint} refuses {named} ({status}: {first_line(answer)}): see its page."
