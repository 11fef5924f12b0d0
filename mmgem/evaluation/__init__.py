"""
The evaluation suite: `python -m mmgem.evaluation`.

`METRICS` is the folder of its metrics for `evaluate`: `evaluate.load(os.path.join(METRICS, "image_captioning.py"))`.
"""

import os


METRICS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "metrics")
