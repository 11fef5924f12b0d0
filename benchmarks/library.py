"""
`mmgem embed` beside the bare model on tensors in memory and sentence-transformers' encode, on the same files and
weights; memory at two sizes; Ray beside torchrun; search of a million vectors.

    python benchmarks/library.py --model outputs/mine --hub outputs/hub --images train.parquet --vectors vectors.npy

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


def run(part: str, model: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds and peak memory of a part, in its own process."""
    command = [sys.executable, __file__, "--part", part, "--model", model, "--folder", str(folder), "--dtype", dtype]
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
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--hub", help="the model as push_to_hub.py exports it, for sentence-transformers")
    parser.add_argument("--images")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--side", type=int, help="pixels of a tenth of the images, enlarged, in a run of their own")
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
    result: dict[str, object] = {"count": args.count, "dtype": args.dtype, "threads": torch.get_num_threads()}
    if args.model:
        with tempfile.TemporaryDirectory() as all_images, tempfile.TemporaryDirectory() as few:
            folder = Path(all_images)
            write_jpegs(args.images, folder, args.count)
            write_jpegs(args.images, Path(few), args.count // 10)
            first, own = run("bare", args.model, folder, args.dtype), run("ours", args.model, folder, args.dtype)
            peer = run("sentence_transformers", args.hub, folder, args.dtype)
            last, small = run("bare", args.model, folder, args.dtype), run("ours", args.model, Path(few), args.dtype)
            alone = (first["seconds"] + last["seconds"]) / 2
            result["images_per_second"] = round(args.count / own["seconds"], 1)
            result["of_the_bare_model"] = round(alone / own["seconds"], 3)
            result["times_sentence_transformers"] = round(peer["seconds"] / own["seconds"], 3)
            result["peak_mib"] = {str(args.count // 10): small["peak_mib"], str(args.count): own["peak_mib"]}
            options = ["--model", args.model, "--dtype", args.dtype, "--num_workers"]
            with tempfile.TemporaryDirectory() as outputs:
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
                embed = ["mmgem", "embed", all_images, *options]
                two = launched([*torchrun, *embed, "0", "-o", f"{outputs}/torchrun"])
                ray = launched([sys.executable, "-m", *embed, "2", "--engine", "ray", "-o", f"{outputs}/ray"])
            result["seconds_of_two_processes"] = {"torchrun": round(two, 1), "ray": round(ray, 1)}
            result["ray_of_torchrun"] = round(two / ray, 3)
            if args.side:
                for file in folder.iterdir():
                    file.unlink()
                write_jpegs(args.images, folder, args.count // 10, args.side)
                large = [
                    run(part, args.model if part != "sentence_transformers" else args.hub, folder, args.dtype)
                    for part in PARTS
                ]
                result[f"of_{args.side}_pixels"] = {
                    "of_the_bare_model": round(large[0]["seconds"] / large[1]["seconds"], 3),
                    "times_sentence_transformers": round(large[2]["seconds"] / large[1]["seconds"], 3),
                }
    if args.vectors:
        result["search_of_a_million"] = {name: search(args.vectors, name) for name in ("float32", "int8")}
    print(json.dumps(result))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
