"""
Embedded vector stores side by side: time to build, bytes on disk, milliseconds a query, recall@10 of the exact scan.

    pip install faiss-cpu usearch lancedb
    python benchmarks/patch_vectors.py TOWER IMAGES.parquet --count 1010000 --output vectors.npy
    python benchmarks/vector_stores.py vectors.npy --sizes 10000 100000 1000000 --output results.json

The last 200 vectors are the queries, one at a time. "binary" keeps the signs and re-ranks the best 200 by float32,
which are counted among its bytes.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import faiss
import lancedb
import numpy as np
import pyarrow as pa
from usearch.index import Index as UsearchIndex
from usearch.index import MetricKind, ScalarKind


QUERIES, TOP, RERANKED = 200, 10, 200
Search = Callable[[np.ndarray], np.ndarray]


def folder_bytes(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(parent, f)) for parent, _, files in os.walk(folder) for f in files)


def with_faiss(kind: str, probed: int = 0) -> Callable[[np.ndarray, str], Search]:
    """An index of FAISS's factory, written and read again; `probed` lists of an inverted file are searched."""

    def build(vectors: np.ndarray, folder: str) -> Search:
        lists = 2 ** round(np.log2(4 * len(vectors) ** 0.5))
        index = faiss.index_factory(vectors.shape[1], kind.format(lists=lists), faiss.METRIC_INNER_PRODUCT)
        rng = np.random.default_rng(0)
        index.train(vectors[np.sort(rng.choice(len(vectors), min(len(vectors), 64 * lists), replace=False))])
        for start in range(0, len(vectors), 65536):
            index.add(vectors[start : start + 65536])
        faiss.write_index(index, os.path.join(folder, "index.faiss"))
        index = faiss.read_index(os.path.join(folder, "index.faiss"))
        if probed:
            index.nprobe = probed
        return lambda query: index.search(query[None], TOP)[1][0]

    return build


def faiss_binary(vectors: np.ndarray, folder: str) -> Search:
    index = faiss.IndexBinaryFlat(vectors.shape[1])
    index.add(np.packbits(vectors > 0, axis=1))
    faiss.write_index_binary(index, os.path.join(folder, "index.faiss"))
    np.save(os.path.join(folder, "vectors.npy"), vectors)
    kept = np.load(os.path.join(folder, "vectors.npy"), mmap_mode="r")

    def search(query: np.ndarray) -> np.ndarray:
        best = np.sort(index.search(np.packbits(query > 0)[None], RERANKED)[1][0])
        return best[np.argsort(-(kept[best] @ query), kind="stable")[:TOP]]

    return search


def with_usearch(kind: ScalarKind, expansion: int) -> Callable[[np.ndarray, str], Search]:
    def build(vectors: np.ndarray, folder: str) -> Search:
        is_binary = kind == ScalarKind.B1
        metric = MetricKind.Hamming if is_binary else MetricKind.IP
        index = UsearchIndex(ndim=vectors.shape[1], metric=metric, dtype=kind, expansion_search=expansion)
        rows = np.packbits(vectors > 0, axis=1) if is_binary else vectors
        index.add(np.arange(len(rows)), rows, threads=os.cpu_count())
        index.save(os.path.join(folder, "index.usearch"))
        index = UsearchIndex.restore(os.path.join(folder, "index.usearch"), view=True)
        index.expansion_search = expansion
        if not is_binary:
            return lambda query: index.search(query, TOP).keys
        np.save(os.path.join(folder, "vectors.npy"), vectors)
        kept = np.load(os.path.join(folder, "vectors.npy"), mmap_mode="r")

        def search(query: np.ndarray) -> np.ndarray:
            best = np.sort(index.search(np.packbits(query > 0), RERANKED).keys.astype(np.int64))
            return best[np.argsort(-(kept[best] @ query), kind="stable")[:TOP]]

        return search

    return build


def with_lancedb(kind: str, probed: int, refined: int = 0) -> Callable[[np.ndarray, str], Search]:
    def build(vectors: np.ndarray, folder: str) -> Search:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        rows = pa.table({"id": pa.array(np.arange(len(vectors))), "vector": column})
        table = lancedb.connect(folder).create_table("vectors", rows)
        table.create_index(metric="dot", index_type=kind, vector_column_name="vector")

        def search(query: np.ndarray) -> np.ndarray:
            found = table.search(query).distance_type("dot").nprobes(probed).select(["id", "_distance"]).limit(TOP)
            found = found.refine_factor(refined) if refined else found
            return found.to_arrow()["id"].to_numpy()

        return search

    return build


STORES: dict[str, Callable[[np.ndarray, str], Search]] = {
    "faiss Flat": with_faiss("Flat"),
    "faiss SQ8": with_faiss("SQ8"),
    "faiss binary, re-ranked": faiss_binary,
    "faiss IVF,Flat, 32 lists": with_faiss("IVF{lists},Flat", 32),
    "faiss IVF,Flat, 64 lists": with_faiss("IVF{lists},Flat", 64),
    "faiss IVF,SQ8, 32 lists": with_faiss("IVF{lists},SQ8", 32),
    "faiss IVF,SQ8, 64 lists": with_faiss("IVF{lists},SQ8", 64),
    "usearch HNSW float32": with_usearch(ScalarKind.F32, 128),
    "usearch HNSW int8": with_usearch(ScalarKind.I8, 128),
    "usearch HNSW binary, re-ranked": with_usearch(ScalarKind.B1, 400),
    "lancedb IVF_FLAT": with_lancedb("IVF_FLAT", 64),
    "lancedb IVF_HNSW_SQ": with_lancedb("IVF_HNSW_SQ", 64, 5),
    "lancedb IVF_PQ, re-ranked": with_lancedb("IVF_PQ", 64, 20),
}


def measured(build: Callable[[np.ndarray, str], Search], vectors: np.ndarray, queries: np.ndarray, truth: Any) -> dict:
    """One row."""
    folder = tempfile.mkdtemp(dir=os.environ.get("TMPDIR"))
    try:
        start = time.perf_counter()
        search = build(vectors, folder)
        built = time.perf_counter() - start
        search(queries[0])
        found, times = [], []
        for query in queries:
            start = time.perf_counter()
            found.append(search(query))
            times.append(time.perf_counter() - start)
        hits = np.mean([len(set(a.tolist()) & set(b.tolist())) / TOP for a, b in zip(found, truth)])
        return {
            "build_s": round(built, 1),
            "bytes_per_number": round(folder_bytes(folder) / vectors.size, 2),
            "ms": round(1000 * float(np.median(times)), 2),
            "recall": round(float(hits), 4),
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Prints a row for each store and size, and writes all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=list(STORES))
    parser.add_argument("--output")
    args = parser.parse_args()
    vectors = np.load(args.vectors, mmap_mode="r")
    queries = np.ascontiguousarray(vectors[-QUERIES:])
    rows = []
    for size in args.sizes:
        part = np.ascontiguousarray(vectors[:size])
        exact = faiss.IndexFlatIP(part.shape[1])
        exact.add(part)
        truth = exact.search(queries, TOP)[1]
        del exact
        for name in args.stores:
            row = {"vectors": size, "store": name, **measured(STORES[name], part, queries, truth)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.output:
        setting = {"dimension": part.shape[1], "queries": QUERIES, "threads": faiss.omp_get_max_threads()}
        versions = {"faiss": faiss.__version__, "lancedb": lancedb.__version__}
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"setting": {**setting, **versions}, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
