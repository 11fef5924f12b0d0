"""
What `import mmgem` costs beside the import of transformers that any such package needs: fresh processes, alternating.

    python benchmarks/import_cost.py [--repeats 11]
"""

import argparse
import statistics
import subprocess
import sys
import time

from common import print_result


PEER = "from transformers import PreTrainedModel, ProcessorMixin, AutoModel, AutoProcessor"
OURS = "import mmgem"


def seconds(statement: str) -> float:
    """Wall-clock time of a fresh interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints a table and, as the last line, the ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="Runs of each statement, after one to warm the disk.")
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {PEER: [], OURS: []}
    for run in range(repeats + 1):
        for statement, values in times.items():
            value = seconds(statement)
            if run > 0:
                values.append(value)
    medians = {statement: statistics.median(values) for statement, values in times.items()}
    for statement, values in times.items():
        print(f"{medians[statement]:6.3f} s  ({min(values):.3f} to {max(values):.3f})  {statement}")
    ratio = round(medians[OURS] / medians[PEER], 3)
    print_result("import_cost", ratio, "x the peer's time", "<= 1.2", PEER)


if __name__ == "__main__":
    main()
