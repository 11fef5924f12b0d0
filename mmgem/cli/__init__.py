"""The command line: `mmgem`, and what `train.py` and `push_to_hub.py` run."""
