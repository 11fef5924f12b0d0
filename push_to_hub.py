"""
Writes the Hub folder of a trained model, and uploads it.

    python push_to_hub.py --model outputs/scenes --repo_id org/mm-gem --output_dir outputs/hub --dry_run
    python push_to_hub.py --model outputs/scenes --repo_id org/mm-gem --output_dir outputs/hub
"""

import os
import sys
from dataclasses import MISSING, dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mmgem.hub.export import export
from mmgem.hub.model_card import CardOptions
from mmgem.hub.upload import upload
from mmgem.options import option, parse_options


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


def main() -> None:
    """Export, list, upload. What the user can put right ends with a line."""
    try:
        options, card = parse_options([PushOptions, CardOptions], "python push_to_hub.py")
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


if __name__ == "__main__":
    main()
