"""The last line of every benchmark."""

import json
import platform

import torch
import transformers

import mmgem


def print_result(name: str, value: float, unit: str, goal: str, peer: str) -> None:
    """One JSON object: the figure, what it is compared with, and what it was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    result = {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "peer": peer,
        "machine": f"{platform.system()} {platform.machine()}, {device}",
        "versions": {
            "mmgem": mmgem.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result))
