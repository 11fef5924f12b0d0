"""Publishing from the command line: `push_to_hub.py` and `mmgem push`."""

import os
import sys
from dataclasses import MISSING, dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..hub.export import export
from ..hub.model_card import CardOptions
from ..hub.upload import upload
from ..options import option, parse_options


@dataclass
class PushOptions:
    """What goes where."""

    model: str = option(MISSING, "Folder of a stage-1 model, as train.py leaves it.")
    repo_id: str = option(MISSING, "Where it goes: user-or-organisation/name.")
    output_dir: str = option(MISSING, "Where the Hub folder is written; replaces an earlier one.")
    adapters: list[str] | None = option(None, "Folders of adapters; by default those in the model's folder.")
    dry_run: bool = option(False, "Write the folder, list it, and upload nothing.")
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch to commit to; created if necessary.")
    create_pr: bool = option(False, "Open a pull request.")
    commit_message: str = option("Upload MM-GEM", "Message of the commit.")

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"--repo_id: {error}") from error
        if "/" not in self.repo_id:
            raise ValueError(f"--repo_id {self.repo_id} names nobody it belongs to: org/{self.repo_id}.")
        if self.create_pr and self.revision is not None:
            raise ValueError("A pull request is to main: --create_pr and --revision exclude each other.")


def main(arguments: list[str] | None = None, script: str = "python push_to_hub.py") -> None:
    """
    Exports, lists and uploads. Errors that the user can put right end it with one line.

    Args:
        arguments: the command line without the script; `sys.argv` by default.
        script: its name in the help.
    """
    try:
        options, card = parse_options([PushOptions, CardOptions], script, arguments)
        files = export(options.model, options.repo_id, options.output_dir, options.adapters, card)
        if card.license is None and card.model_card is None:
            print(
                "--license was not given: the card says apache-2.0 for weights from scratch, and nothing for others."
            )
        sizes = {file: os.path.getsize(os.path.join(options.output_dir, file)) for file in files}
        for file, size in sizes.items():
            print(f"{size:>14,}  {file}")
        print(f"{sum(sizes.values()):>14,}  bytes in {options.output_dir}")
        if options.dry_run:
            return
        names = ("output_dir", "repo_id", "private", "revision", "create_pr", "commit_message")
        url = upload(*(getattr(options, name) for name in names))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(url)
