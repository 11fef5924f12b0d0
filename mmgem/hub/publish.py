"""A finished run of train.py, to the Hub."""

import os
import shlex
from pathlib import Path
from typing import Any

from .export import export, find_adapters
from .upload import upload


class PublishError(ValueError):
    """A finished run could not be pushed; the message says how to repeat it."""


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
