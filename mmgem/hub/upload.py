"""A folder that [`export`] wrote, or a finished run of train.py, to the Hub in one commit."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.hf_api import RepoFile

from ..modeling_mmgem.adapters_mmgem import ADAPTERS
from ..options import checked_token
from .export import IMAGES, WEIGHTS, export, files_of, find_adapters, matches


# huggingface_hub wraps the fault of an upload in a RuntimeError, and hf_xet raises OSErrors of its own.
FAULTS = (HTTPError, OSError, RuntimeError, json.JSONDecodeError)
RETRIABLE_STATUSES = (None, 408, 412, 429, 500, 502, 503, 504)  # None: no answer


class PublishError(ValueError):
    """A finished run could not be pushed; the message says how to repeat it."""


def upload(
    folder: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload MM-GEM",
    token: str | None = None,
) -> str:
    """
    Creates the repository if necessary, uploads the files that it lacks, and commits all of them at once: a download
    meanwhile gets the old files or the new ones. The same commit deletes what an earlier export put there and this one
    no longer has: shards, code, images, and adapters whose base's weights change. Other files stay. After an
    interruption, the same command does not send files again that had arrived.

    Args:
        private: of a new repository.
        revision: a branch, created if necessary; `main` by default.
        create_pr: open a pull request instead of committing to the branch.
        token: by default that of `hf auth login` or HF_TOKEN.

    Returns:
        the URL of the commit or pull request.

    Raises:
        ConnectionError: if the Hub refuses or cannot be reached, with the state of the repository.
        ValueError: for `private` if the repository is public already, and for an invalid token.
    """
    token = token or get_token()
    if token is None:
        raise ConnectionError("There is no token to upload with: run `hf auth login`, or set HF_TOKEN.")
    token = checked_token(token)
    # Not HfApi.upload_folder: where hf_xet is installed it may make several commits of one folder.
    api, head = HfApi(token=token), None
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is public already; make it private on the Hub, or leave out --private.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=revision).sha
        additions = [
            CommitOperationAdd(path_in_repo=file.as_posix(), path_or_fileobj=Path(folder, file))
            for file in files_of(Path(folder))
        ]
        commit = api.create_commit(
            repo_id,
            [*additions, *_deletions(api, repo_id, revision, additions)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    except FAULTS as error:
        state = _state(api, repo_id, revision, head, create_pr)
        raise ConnectionError(f"{state} {_explain(error)}") from error
    return commit.pr_url or commit.commit_url


def publish(args: Any, repo_id: str, base: str | None) -> str:
    """
    Pushes the trained model, or its base with the trained adapter, as push_to_hub.py does.

    Args:
        args: training arguments of the run.
        base: folder of the stage-1 model beside which stage 2 trained an adapter.

    Returns:
        the URL of the commit.

    Raises:
        PublishError: with the command to repeat it.
    """
    folder = os.path.join(args.output_dir, "hub")
    model, adapters = args.output_dir, None
    if args.stage != "1":
        assert base is not None
        model = base
        adapters = [str(path) for path in {**find_adapters(Path(base)), args.stage: Path(args.output_dir)}.values()]
    try:
        export(model, repo_id, folder, adapters)
        return upload(folder, repo_id, args.hub_private_repo, args.hub_revision, token=args.hub_token)
    except (ValueError, OSError) as error:
        words = ["python", "push_to_hub.py", "--model", model, "--repo_id", repo_id, "--output_dir", folder]
        words += ["--adapters", *adapters] if adapters else []
        words += ["--revision", args.hub_revision] if args.hub_revision else []
        words += ["--private"] if args.hub_private_repo else []
        raise PublishError(
            f"{args.output_dir} is saved, but could not be pushed: {error}\nOnce more: {shlex.join(words)}"
        ) from error


def _deletions(
    api: HfApi, repo_id: str, revision: str | None, additions: list[CommitOperationAdd]
) -> list[CommitOperationDelete]:
    """Deletions of files that only an earlier export can have put there and this one does not have."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    remote = {file.path: file.lfs for file in tree if isinstance(file, RepoFile)}
    ours = {addition.path_in_repo: addition for addition in additions}
    stale = [*WEIGHTS, "*_mmgem.py", *(f"images/{name}" for names in IMAGES.values() for name in names)]
    weights = [path for path in ours if path.endswith(".safetensors") and "/" not in path]
    sent = {path: lfs.sha256 for path, lfs in remote.items() if lfs is not None}
    if any(sent.get(path) != ours[path].upload_info.sha256.hex() for path in weights):
        stale += [f"{adapter}/adapter_*" for adapter in ADAPTERS]
    return [CommitOperationDelete(path) for path in remote if path not in ours and matches(path, stale)]


def _state(api: HfApi, repo_id: str, revision: str | None, head: str | None, create_pr: bool) -> str:
    """The state of the repository after a fault, which may have lost the answer to a commit that was made."""
    if head is None:
        return f"Nothing was committed to {repo_id}:"
    if create_pr:
        return f"{repo_id} itself was left as it is; look whether it has a pull request already:"
    try:
        now = api.repo_info(repo_id, revision=revision).sha
    except FAULTS:
        return f"{repo_id} cannot be asked what it holds now:"
    if now == head:
        return f"{repo_id} was left as it is:"
    return f"{repo_id} has a new commit, {now}, perhaps this one, whose answer was lost; look at it first:"


def _explain(error: Exception) -> str:
    cause: Any = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text = str(cause).strip() or type(cause).__name__
    if cause is not error:
        text = f"{error} {text}"
    if status in (401, 403) or isinstance(cause, PermissionError):
        return f"the token may not write there ({status or 'refused'}); run `hf auth login` with one that may. {text}"
    if status in RETRIABLE_STATUSES:
        text += "\nRun the command again: what has arrived is not sent twice."
    return text
