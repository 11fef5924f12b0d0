"""
Finds hard negatives with a model, and writes them beside the data; and clusters of like examples, to batch together.

    python -m mmgem.mining --model org/mm-gem --data_file train.parquet --caption_column captions \\
        --absolute_margin=-0.1 --output_file mined.parquet

Images with captions get a column `negative_caption` (`--negative_caption_column` of train.py), with captions of other
images; triplets of fused-retrieval get the columns `negative_image` and `negative_text`, with the target of another
query, which may be an image, a text or both. The options are those of sentence-transformers' `mine_hard_negatives`.
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from torch.nn.functional import normalize

from .data.arguments import TableArguments
from .data.loading import BUILT_IN, Table, checked_table, read_table, triplets_of_table
from .data.pairs import PairDataset
from .data.samplers import CLUSTER_COLUMN
from .data.table_files import load_named
from .data.triplets import COLUMNS, MMEB_COLUMNS, SIDES, with_triplet_columns
from .evaluation.embedding import embed_pairs, evaluating
from .evaluation.fused import embed_triplets
from .evaluation.sharing import is_first_process
from .loading import load_with_adapters
from .modeling_mmgem import MMGEMModel
from .options import option, parse_options
from .processing import MMGEMProcessor


BLOCK = (1024, 16384)  # queries and keys whose similarities exist at a time: 64 MiB
DIRECTION_STEPS = 20  # of the power iteration that finds where a set of vectors is widest
NEGATIVE_COLUMN = "negative_caption"


@dataclass
class MiningArguments(TableArguments):
    """What to mine, with which model, and which candidates count as hard negatives."""

    model: str = option("", "MM-GEM checkpoint, a folder or a Hub id.")
    adapters: list[str] = option([], "Adapter of fused queries, for triplets.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the model.")
    data_file: str | None = option(None, "Table to mine: parquet, jsonl, json or csv.")
    split: str = option("train", "Split of --dataset_name.")
    output_file: str = option("mined.parquet", "Parquet that the table is written to, with the new columns.")
    max_samples: int | None = option(None, "Mine the first rows alone.")
    batch_size: int = option(64, "Examples that go through the model at a time.")
    num_negatives: int = option(3, "Negatives of each query; 0 mines none, where clusters alone are wanted.")
    range_min: int = option(0, "Skips so many of the nearest candidates, which may be true.")
    range_max: int | None = option(
        None,
        "How many of the nearest that are no positives are candidates. By default range_min + num_negatives, or "
        "range_min + 10 x num_negatives with max_score, a margin or random sampling.",
    )
    max_score: float | None = option(None, "Highest cosine of a negative with its query.")
    min_score: float | None = option(None, "Lowest cosine.")
    absolute_margin: float | None = option(
        None, "A negative's cosine is at least this much below the positive's; UniME's 0.1 above it is -0.1."
    )
    relative_margin: float | None = option(None, "The same as a share of the positive's cosine: 0.05 is 5 % less.")
    sampling_strategy: Literal["top", "random"] = option("top", "The hardest of the candidates, or any of them.")
    cluster_size: int = option(
        0,
        "Images with captions: also a column `cluster`, so many like rows each (--batch_sampler clustered); 0: none.",
    )
    seed: int = option(0, "Of the random choice.")

    def __post_init__(self) -> None:
        self.require_one_of(("dataset_name", "data_file"))
        if self.dataset_name in BUILT_IN:
            raise ValueError(f"{self.dataset_name} are drawn anew each time. Give --data_file, or another dataset.")
        if not self.model:
            raise ValueError("Give --model, the checkpoint to mine with.")
        if not self.output_file.endswith(".parquet"):
            raise ValueError(f"output_file must end in .parquet, got {self.output_file}.")
        self.require_at_least(1, "batch_size", "max_samples", "range_max")
        self.require_at_least(0, "num_negatives", "range_min", "cluster_size")
        if not self.num_negatives and not self.cluster_size:
            raise ValueError("num_negatives and cluster_size are both 0: nothing is to be done. Raise one of them.")
        if self.num_negatives > self.last_rank - self.range_min:
            raise ValueError(
                f"range_min {self.range_min} and range_max {self.range_max} leave fewer than {self.num_negatives} "
                "candidates. Raise range_max, or lower num_negatives."
            )

    @property
    def last_rank(self) -> int:
        """How many of the nearest candidates are looked at."""
        filters = (self.max_score, self.absolute_margin, self.relative_margin)
        needs_spare = self.sampling_strategy == "random" or any(value is not None for value in filters)
        spare = 10 if needs_spare else 1
        return self.range_min + spare * self.num_negatives if self.range_max is None else self.range_max


class Embedded(NamedTuple):
    """Queries `(N, D)`, distinct keys `(M, D)`, the pairs (query, key) that belong together, and pairs of no use."""

    queries: torch.Tensor
    keys: torch.Tensor
    positives: torch.Tensor
    excluded: list[tuple[int, int]] = []


def find_negatives(found: Embedded, arguments: MiningArguments) -> list[list[int]]:
    """The keys that are each query's hard negatives, hardest first; fewer where no more candidates are left."""
    left_out = torch.cat([found.positives, torch.tensor(found.excluded, dtype=torch.long).view(-1, 2)])
    scores, indices = nearest_others(found.queries, found.keys, left_out, arguments.last_rank)
    rows, columns = found.positives.unbind(1)
    own = (found.queries[rows] * found.keys[columns]).sum(1)
    lowest = torch.full((len(found.queries),), torch.inf).scatter_reduce(0, rows, own, "amin")[:, None]
    allowed = scores > -torch.inf
    if arguments.max_score is not None:
        allowed &= scores <= arguments.max_score
    if arguments.min_score is not None:
        allowed &= scores >= arguments.min_score
    if arguments.absolute_margin is not None:
        allowed &= scores <= lowest - arguments.absolute_margin
    if arguments.relative_margin is not None:
        allowed &= scores <= lowest - lowest.abs() * arguments.relative_margin
    allowed &= allowed.cumsum(1) > arguments.range_min
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = []
    for row, ok in zip(indices, allowed):
        candidates = row[ok]
        if arguments.sampling_strategy == "random":
            drawn = torch.randperm(len(candidates), generator=generator)[: arguments.num_negatives]
            candidates = candidates[drawn.sort().values]
        chosen.append(candidates[: arguments.num_negatives].tolist())
    return chosen


def nearest_others(
    queries: torch.Tensor, keys: torch.Tensor, left_out: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `count` keys of the highest cosines of each query, without the pairs (query, key) of `left_out` `(P, 2)`:
    cosines, falling, and indices, both `(N, count)`; -inf where there are no more. Exact, in blocks: memory grows with
    N + M alone.
    """
    left_out = left_out[left_out[:, 0].argsort(stable=True)]
    starts = torch.searchsorted(
        left_out[:, 0].contiguous(), torch.arange(0, len(queries) + BLOCK[0], BLOCK[0])
    ).tolist()
    all_scores, all_indices = [], []
    for b, block in enumerate(queries.split(BLOCK[0])):
        own = left_out[starts[b] : starts[b + 1]] - torch.tensor([b * BLOCK[0], 0])
        best = block.new_full((len(block), count), -torch.inf), torch.full((len(block), count), -1)
        for start in range(0, len(keys), BLOCK[1]):
            scores = block @ keys[start : start + BLOCK[1]].T
            here = own[(own[:, 1] >= start) & (own[:, 1] < start + BLOCK[1])]
            scores[here[:, 0], here[:, 1] - start] = -torch.inf
            found = scores.topk(min(count, scores.shape[1]))
            both_scores, both_indices = (torch.cat(x, 1) for x in zip(best, (found.values, found.indices + start)))
            top = both_scores.topk(count)
            best = top.values, both_indices.gather(1, top.indices)
        all_scores.append(best[0])
        all_indices.append(best[1])
    return torch.cat(all_scores), torch.cat(all_indices)


def clusters_of(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """
    A number `(N,)` for each vector `(N, D)`; those of one number are alike, and at most `size` many. A set that is
    too large is cut in halves across the direction in which it is widest.
    """
    clusters, count = torch.empty(len(vectors), dtype=torch.long), 0
    waiting = [torch.arange(len(vectors))]
    while waiting:
        members = waiting.pop()
        if len(members) <= size:
            clusters[members] = count
            count += 1
            continue
        centred = vectors[members] - vectors[members].mean(0)
        direction = centred[centred.norm(dim=1).argmax()]
        for _ in range(DIRECTION_STEPS):
            direction = normalize(centred.T @ (centred @ direction), dim=0)
        order = (centred @ direction).argsort()
        # Halves of a whole number of clusters, so that few clusters are small.
        middle = size * max(1, round(len(members) / size / 2))
        waiting += [members[order[middle:]], members[order[:middle]]]
    return clusters


def mine_pairs(
    model: MMGEMModel, processor: MMGEMProcessor, table: Table, arguments: MiningArguments
) -> datasets.Dataset | None:
    """
    The rows whose image can be read, with the captions of other images that are nearest to it. All processes embed;
    the first one chooses, and the others return None.
    """
    table = checked_table(table, arguments, ("image_column", "caption_column"), arguments.max_samples)
    dataset = PairDataset(table.rows, arguments.image_column, arguments.caption_column, root=table.root)
    found = embed_pairs(model, processor, dataset, arguments.batch_size)
    if not is_first_process():
        return None
    texts = [caption for captions in dataset.select(found["indices"]).captions() for caption in captions]
    first = {text: i for i, text in reversed(list(enumerate(texts)))}  # of each distinct text
    columns = {text: column for column, text in enumerate(first)}
    # An image that occurs twice has the captions of both.
    groups: dict[int, set[int]] = {}
    image_ids = [dataset.image_id(index) for index in found["indices"]]
    for text, image in zip(texts, found["text_to_image"].tolist()):
        groups.setdefault(image_ids[image], set()).add(columns[text])
    images, captions = found["image_embeds"], found["text_embeds"]
    rows, names = table.rows.select(found["indices"]), list(first)
    rows = rows.remove_columns([name for name in (NEGATIVE_COLUMN, CLUSTER_COLUMN) if name in rows.column_names])
    if arguments.num_negatives:
        positives = [(i, column) for i, image_id in enumerate(image_ids) for column in sorted(groups[image_id])]
        embedded = Embedded(images, captions[list(first.values())], torch.tensor(positives))
        chosen = find_negatives(embedded, arguments)
        rows = rows.add_column(NEGATIVE_COLUMN, [[names[i] for i in own] for own in chosen])
    if arguments.cluster_size:
        means = torch.zeros_like(images).index_add_(0, found["text_to_image"], captions)
        clusters = clusters_of(normalize(images + normalize(means)), arguments.cluster_size)
        rows = rows.add_column(CLUSTER_COLUMN, clusters.tolist())
    return rows


def mine_triplets(
    model: MMGEMModel, processor: MMGEMProcessor, table: Table, arguments: MiningArguments
) -> datasets.Dataset | None:
    """
    A row for each query that can be read and each of its negatives, the nearest targets of other queries; one without
    a negative where there is none. All processes embed; the first one chooses, and the others return None.
    """
    if arguments.cluster_size:
        raise ValueError("cluster_size is for images with captions, which stage 1 batches by clusters. Leave it out.")
    rows = with_triplet_columns(table.rows)
    dataset = triplets_of_table(Table(rows, table.root), arguments, arguments.max_samples)
    found = embed_triplets(model, processor, dataset, arguments.batch_size)
    if not is_first_process():
        return None
    queries, targets = ([r for r in found.records if r.side == side] for side in SIDES[:2])
    first = {record.id: record for record in reversed(targets)}
    columns = {record_id: column for column, record_id in enumerate(first)}
    groups: dict[int, set[int]] = {}
    for query, target in zip(queries, targets, strict=True):
        groups.setdefault(query.id, set()).add(columns[target.id])
    # The query's own image, without a text, says nothing that the query does not.
    alone = {r.image_id: columns[r.id] for r in first.values() if r.image_id and not r.has_words}
    embedded = Embedded(
        found.embeds[[query.row for query in queries]],
        found.embeds[[record.row for record in first.values()]],
        torch.tensor([(i, column) for i, query in enumerate(queries) for column in sorted(groups[query.id])]),
        [(i, alone[query.image_id]) for i, query in enumerate(queries) if query.image_id in alone],
    )
    sources = [record.example for record in first.values()]
    pairs: list[tuple[int, int | None]] = []  # of rows
    for query, own in zip(queries, find_negatives(embedded, arguments)):
        pairs += [(query.example, sources[j]) for j in own] or [(query.example, None)]

    def negative_of(row: dict[str, Any], index: int) -> dict[str, Any]:
        source = pairs[index][1]
        other = {} if source is None else rows[source]
        return {f"negative_{kind}": other.get(f"target_{kind}") for kind in ("image", "text")}

    mined = rows.select([example for example, _ in pairs])
    return mined.map(negative_of, with_indices=True, features=mined.features, desc="Negatives")


def main(words: list[str] | None = None, script: str = "python -m mmgem.mining") -> None:
    """
    Mines and writes the table. Errors that the user can put right end it with one line.

    Args:
        words: the command line without the script; `sys.argv` by default.
        script: its name in the help.
    """
    try:
        (arguments,) = parse_options([MiningArguments], script, words)
        run(arguments)
    except (ValueError, OSError, DatasetsError) as error:
        sys.exit(f"error: {error}")


def run(arguments: MiningArguments) -> None:
    """Mines, and writes the table once it is whole."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if arguments.dataset_name is not None:
        table = Table(load_named(arguments.dataset_name, arguments.dataset_config_name, arguments.split))
    else:
        table = read_table(str(arguments.data_file), "train")
    if arguments.image_folders:
        table = replace(table, root=arguments.image_folders[0])
    model, processor = load_with_adapters(arguments.model, arguments.adapters, arguments.dtype)
    model.to(state.device)  # type: ignore[arg-type]
    of_triplets = {*COLUMNS[:2], *MMEB_COLUMNS[:2]} & {*table.rows.column_names}
    with evaluating(model):
        mined = (mine_triplets if of_triplets else mine_pairs)(model, processor, table, arguments)
    if mined is None:
        return
    os.makedirs(os.path.dirname(arguments.output_file) or ".", exist_ok=True)
    mined = _with_paths_from(mined, table.root, arguments)
    unfinished = f"{arguments.output_file}.part"
    mined.to_parquet(unfinished)
    os.replace(unfinished, arguments.output_file)
    print(f"{arguments.output_file}: {_summary(mined, len(table.rows))}")


def _with_paths_from(rows: datasets.Dataset, root: str, arguments: MiningArguments) -> datasets.Dataset:
    """
    The rows with relative paths of images from the folder of the output, which were from `root`. Columns of paths
    become strings, since `datasets` would write the files themselves into the table; columns of bytes stay.
    """
    folder, features, names = os.path.dirname(arguments.output_file) or ".", rows.features.copy(), []
    for name, feature in rows.features.items():
        is_image = isinstance(feature, datasets.Image)
        if is_image and pc.struct_field(rows.data.column(name), "bytes").null_count == len(rows):
            features[name] = datasets.Value("string")
            names.append(name)
        elif name == arguments.image_column and getattr(feature, "dtype", "") == "string":
            names.append(name)

    def moved(image: Any) -> str | None:
        path = image["path"] if isinstance(image, dict) else image
        if not path or os.path.isabs(path):
            return path
        return os.path.relpath(os.path.join(root, path), folder)

    if not names:
        return rows
    return rows.map(lambda row: {name: moved(row[name]) for name in names}, features=features, desc="Paths")


def _summary(mined: datasets.Dataset, rows: int) -> str:
    parts = [f"{len(mined)} rows of {rows}"]
    if NEGATIVE_COLUMN in mined.column_names:
        counts = [len(own) for own in mined[NEGATIVE_COLUMN]]
        parts.append(f"{sum(counts)} negatives, none for {counts.count(0)} rows")
    elif "negative_text" in mined.column_names:
        table = mined.data
        empty = [table.column(f"negative_{kind}").is_null().to_numpy() for kind in ("image", "text")]
        parts.append(f"{int((empty[0] & empty[1]).sum())} without a negative")
    if CLUSTER_COLUMN in mined.column_names:
        parts.append(f"{len(set(mined[CLUSTER_COLUMN]))} clusters")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
