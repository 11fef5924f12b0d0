"""
`mmgem embed` beside the bare model on tensors in memory and sentence-transformers' encode, on the same files and
weights; memory at two sizes; Ray beside torchrun; search of a million vectors.

    python benchmarks/library.py --model outputs/mine --hub outputs/hub --images train.parquet --vectors vectors.npy \\
        --output results.json

The images of the parquet are written as JPEG files first. Every part runs in a process of its own, and the bare model
runs before and behind the others. The vectors are those of benchmarks/patch_vectors.py.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image


BATCH = 32
MEASURED = ("embed", "processes", "large", "search")
LARGE = 1600  # pixels of a tenth of the images, enlarged: files as cameras write them


def write_jpegs(parquet: str, folder: Path, count: int, side: int = 0) -> None:
    """The first images of a table as files; with `side` enlarged to so many pixels, as cameras write them."""
    rows = pq.read_table(parquet, columns=["image"]).slice(0, count)["image"].to_pylist()
    assert len(rows) == count, f"{parquet} has {len(rows)} images only"
    for i, row in enumerate(rows):
        path = folder / f"{i:06}.jpg"
        if not side:
            path.write_bytes(row["bytes"])
            continue
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        scale = side / max(image.size)
        image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC).save(path)


def bare(model: str, folder: Path, dtype: str) -> float:
    """Seconds of the model alone, on pixels that are there already, as many as the folder has."""
    from mmgem.evaluation.embedding import embed_pixels
    from mmgem.library import LoadedModel

    loaded = LoadedModel.load(model, device="cpu", dtype=dtype)
    files = sorted(folder.iterdir())
    images = [Image.open(file).convert("RGB") for file in files[: 8 * BATCH]]
    pixels = loaded.processor(images=images, return_tensors="pt")["pixel_values"].split(BATCH)
    embed_pixels(loaded.model, pixels[0])
    start = time.perf_counter()
    for i in range(len(files) // BATCH):
        embed_pixels(loaded.model, pixels[i % len(pixels)])
    return time.perf_counter() - start


def ours(model: str, folder: Path, dtype: str) -> float:
    """Seconds of `build`, from the folder to the index on the disk."""
    from mmgem.library import LoadedModel, SourceOptions
    from mmgem.library.building import build

    loaded = LoadedModel.load(model, device="cpu", dtype=dtype)
    with tempfile.TemporaryDirectory() as index, torch.inference_mode():
        pixels = loaded.processor(images=[Image.open(next(folder.iterdir()))] * BATCH, return_tensors="pt")
        loaded.model.get_embedding(**pixels)
        start = time.perf_counter()
        build(SourceOptions(str(folder)), index, loaded, batch_size=BATCH, workers=1)
        return time.perf_counter() - start


def sentence_transformers(model: str, folder: Path, dtype: str) -> float:
    """Seconds of `encode` of the same paths."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu", trust_remote_code=True, model_kwargs={"dtype": dtype})
    paths = [str(file) for file in sorted(folder.iterdir())]
    encoder.encode(paths[:BATCH], batch_size=BATCH)
    start = time.perf_counter()
    encoder.encode(paths, batch_size=BATCH)
    return time.perf_counter() - start


PARTS = {"bare": bare, "ours": ours, "sentence_transformers": sentence_transformers}


def run(part: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of a part, in its own process."""
    model = args.hub if part == "sentence_transformers" else args.model
    command = [sys.executable, __file__, "--part", part, "--model", model]
    command += ["--folder", str(folder), "--dtype", args.dtype]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    result = json.loads(found)
    print(part, len(list(folder.iterdir())), result, flush=True)
    return result


def launched(command: list[str]) -> float:
    """Seconds of a whole command with one thread in each process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def search(path: str, precision: str) -> dict[str, float]:
    """Milliseconds a query, recall@10 of the exact scan, and bytes of the store, of all vectors but the last 200."""
    from mmgem.library.store import STORE_FILE, open_store
    from mmgem.library.tables import read_vectors

    vectors = np.load(path, mmap_mode="r")
    queries = np.ascontiguousarray(vectors[-200:])
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        np.save(Path(folder, "a.npy"), vectors[:1_000_000])
        start = time.perf_counter()
        store = open_store(read_vectors(folder), folder, precision)
        built = time.perf_counter() - start
        exact = torch.cat([torch.from_numpy(queries) @ torch.from_numpy(np.array(v)).T for v in read_vectors(folder)])
        truth = exact.topk(10).indices.tolist()
        hits, times = [], []
        for query, right in zip(queries, truth):
            start = time.perf_counter()
            found = store.search(query[None], 10)[1][0]
            times.append(time.perf_counter() - start)
            hits.append(len({*found.tolist()} & {*right}) / 10)
        size = (
            os.path.getsize(os.path.join(folder, STORE_FILE.format(precision=precision))) / vectors[:1_000_000].nbytes
        )
    return {
        "build_s": round(built, 1),
        "ms_median": round(1000 * float(np.median(times)), 2),
        "ms_worst": round(1000 * max(times), 2),
        "recall_at_10": round(float(np.mean(hits)), 4),
        "share_of_float32_bytes": round(size, 3),
    }


def main() -> None:
    """Measures, prints, and writes into the results that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--hub", help="the model as push_to_hub.py exports it, for sentence-transformers")
    parser.add_argument("--images")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--measure", nargs="+", default=[*MEASURED], choices=MEASURED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vectors")
    parser.add_argument("--output")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.part:
        seconds = PARTS[args.part](args.model, args.folder, args.dtype)
        peak = (
            sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
        )
        print(json.dumps({"seconds": round(seconds, 2), "peak_mib": round(peak)}))
        return
    kept = json.loads(Path(args.output).read_text()) if args.output and Path(args.output).exists() else {}
    result = {**kept, "count": args.count, "dtype": args.dtype, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        if args.measure != ["search"]:
            write_jpegs(args.images, Path(folder), args.count)
        if "embed" in args.measure:
            result |= measured_embedding(args, Path(folder))
        if "processes" in args.measure:
            result |= measured_processes(args, folder)
    if "large" in args.measure:
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(args.images, Path(folder), args.count // 10, LARGE)
            alone, own, peer = (run(part, args, Path(folder)) for part in PARTS)
            result[f"of_{LARGE}_pixels"] = ratios(alone["seconds"], own, peer)
    if "search" in args.measure:
        result["search_of_a_million"] = {name: search(args.vectors, name) for name in ("float32", "int8")}
    print(json.dumps(result))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured_embedding(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Ours between two runs of the bare model, sentence-transformers, and ours with a tenth of the files."""
    first, own, peer, last = (run(part, args, folder) for part in (*PARTS, "bare"))
    with tempfile.TemporaryDirectory() as few:
        write_jpegs(args.images, Path(few), args.count // 10)
        small = run("ours", args, Path(few))
    return {
        "images_per_second": round(args.count / own["seconds"], 1),
        **ratios((first["seconds"] + last["seconds"]) / 2, own, peer),
        "peak_mib": {str(args.count // 10): small["peak_mib"], str(args.count): own["peak_mib"]},
    }


def ratios(alone: float, own: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    return {
        "of_the_bare_model": round(alone / own["seconds"], 3),
        "times_sentence_transformers": round(peer["seconds"] / own["seconds"], 3),
    }


def measured_processes(args: argparse.Namespace, folder: str) -> dict[str, object]:
    """Two processes of one thread each, by torchrun and by Ray, start included."""
    embed = ["mmgem", "embed", folder, "--model", args.model, "--dtype", args.dtype, "--num_workers"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with tempfile.TemporaryDirectory() as outputs:
        two = launched([*torchrun, *embed, "0", "-o", f"{outputs}/torchrun"])
        ray = launched([sys.executable, "-m", *embed, "2", "--engine", "ray", "-o", f"{outputs}/ray"])
    seconds = {"torchrun": round(two, 1), "ray": round(ray, 1)}
    return {"seconds_of_two_processes": seconds, "ray_of_torchrun": round(two / ray, 3)}


if __name__ == "__main__":
    main()
