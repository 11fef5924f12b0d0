"""
Writes the Hub folder of a trained model, and uploads it.

    python push_to_hub.py --model outputs/scenes --repo_id org/mm-gem --output_dir outputs/hub --dry_run
    python push_to_hub.py --model outputs/scenes --repo_id org/mm-gem --output_dir outputs/hub
"""

from mmgem.cli.push import main


if __name__ == "__main__":
    main()
