"""The command `mmgem`: its options. What a command does is imported when it runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer


app = typer.Typer(
    help="Embeds, searches and captions your images with one MM-GEM model, and trains it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Format = Literal["parquet", "npy"]
Engine = Literal["local", "ray"]
Precision = Literal["float32", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]
# The same option means the same in every command.
Source = Annotated[
    str, typer.Argument(help="Folder of images, table, tar shards, Hub dataset, or 'scenes'.", show_default=False)
]
Model = Annotated[str, typer.Option("--model", help="Checkpoint: folder or Hub id.", show_default=False)]
IndexModel = Annotated[
    str | None, typer.Option("--model", help="Checkpoint; by default the index's.", show_default=False)
]
IndexFolder = Annotated[
    str, typer.Option("--index", help="Of mmgem embed, or vectors of CLIP or SigLIP.", show_default=False)
]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Images at a time.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one.", show_default=False)
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision of the weights.")]
Crop = Annotated[
    bool,
    typer.Option(
        "--do_center_crop/--no_do_center_crop", help="Cut out the middle, if the model does; or squeeze the image."
    ),
]
ImageColumn = Annotated[str, typer.Option("--image_column", help="Of a table or dataset.")]
Split = Annotated[str, typer.Option("--split", help="Of a dataset.")]
Config = Annotated[str | None, typer.Option("--dataset_config_name", help="Of a Hub dataset.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for what the user can put right: exit code 1; 130 where it is interrupted."""
    import torch
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.utils import logging

    from ..evaluation.sharing import OtherProcessFailed

    logging.disable_progress_bar()  # of loading weights; ours stays
    try:
        yield
    except (ValueError, OSError, HfHubHTTPError, ImportError) as error:
        sys.exit(f"error: {error}")
    except OtherProcessFailed as error:
        sys.exit(f"error: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("error: The memory is full. Lower --batch_size.")
    except KeyboardInterrupt:
        print("interrupted; mmgem embed and mmgem caption go on where they stopped", file=sys.stderr)
        sys.exit(130)


@app.command()
def embed(
    source: Source,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the index.")] = "index",
    image_column: ImageColumn = "image",
    split: Split = "train",
    dataset_config_name: Config = None,
    format: Annotated[Format, typer.Option("--format", help="npy: clip-retrieval's folders.")] = "parquet",
    engine: Annotated[Engine, typer.Option("--engine", help="ray: many machines.")] = "local",
    num_workers: Annotated[
        int, typer.Option("--num_workers", min=0, help="Processes that read images; of ray, that embed.")
    ] = 1,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOption = "float32",
    do_center_crop: Crop = True,
    as_json: Json = False,
) -> None:
    """Embed images into an index. Run again, it adds new images and removes those that are gone."""
    with one_line_errors():
        from .library import embed_images

        source_options = {"name": source, "image_column": image_column, "split": split, "config": dataset_config_name}
        loading = {"name": model, "device": device, "dtype": dtype, "do_center_crop": do_center_crop}
        building = {"form": format, "batch_size": batch_size, "workers": num_workers}
        embed_images(source_options, output, loading, building, engine, as_json)


@app.command()
def search(
    index: IndexFolder,
    query: Annotated[str | None, typer.Argument(help="What the images show.", show_default=False)] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Search with an image: path or URL.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Beside --image: how it differs.", show_default=False)
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", help="x0,y0,x1,y1: search with a part of --image.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of images.")] = 20,
    rerank: Annotated[int, typer.Option("--rerank", min=0, help="So many are re-ordered by likelihood.")] = 0,
    regions: Annotated[bool, typer.Option("--regions", help="Order by the best region, and show it.")] = False,
    precision: Annotated[Precision, typer.Option("--precision", help="Of the vectors.")] = "float32",
    output: Annotated[str, typer.Option("--output", "-o", help="Contact sheet.")] = "search.png",
    model: IndexModel = None,
    device: Device = None,
    dtype: DtypeOption = "float32",
    as_json: Json = False,
) -> None:
    """Search an index by text, image, or both.

    Prints a table, and writes a contact sheet.
    """
    with one_line_errors():
        from .library import search_index

        if query is not None and text is not None:
            raise ValueError("QUERY and --text are the same; give one of them.")
        loading = {"name": model, "device": device, "dtype": dtype}
        asked = {"text": query if text is None else text, "image": image, "top": top, "rerank": rerank}
        search_index(index, {**asked, "regions": regions}, box, loading, precision, output, as_json)


@app.command()
def caption(
    source: Source,
    model: Model,
    output: Annotated[
        str, typer.Option("--output", "-o", help=".jsonl, .csv, .json (COCO's results), or txt: beside each image.")
    ] = "captions.jsonl",
    boxes: Annotated[
        str | None, typer.Option("--boxes", help="COCO's instances_*.json, or .jsonl with boxes.", show_default=False)
    ] = None,
    rerank: Annotated[int, typer.Option("--rerank", min=0, help="Draw so many captions, take the best.")] = 0,
    num_beams: Annotated[int, typer.Option("--num_beams", min=1, help="Beams; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", min=1, help="Of a caption.", show_default=False)
    ] = None,
    image_column: ImageColumn = "image",
    split: Split = "train",
    dataset_config_name: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: DtypeOption = "float32",
    do_center_crop: Crop = True,
    as_json: Json = False,
) -> None:
    """Write captions of images, or of boxes in them. An interrupted run goes on where it stopped."""
    with one_line_errors():
        from .library import caption_images

        source_options = {"name": source, "image_column": image_column, "split": split, "config": dataset_config_name}
        loading = {"name": model, "device": device, "dtype": dtype, "do_center_crop": do_center_crop}
        how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "num_beams": num_beams, "draws": rerank}
        caption_images(source_options, output, loading, how, boxes, overwrite, as_json)


@app.command()
def serve(
    index: IndexFolder = "",
    model: IndexModel = None,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0: reachable by others.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the page.")] = 7860,
    device: Device = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Serve a page to search, describe and point.

    Without options it shows the demo's model and scenes.
    """
    with one_line_errors():
        from .library import serve_page

        serve_page(index or None, {"name": model, "device": device, "dtype": dtype}, host, port)


FORWARD: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@app.command(**FORWARD)
def train(context: typer.Context) -> None:
    """Train a model or an adapter, as train.py does."""
    from .train import main

    main(context.args, "mmgem train")


@app.command(**FORWARD)
def evaluate(context: typer.Context) -> None:
    """Evaluate a checkpoint, as mmgem.evaluation does."""
    from ..evaluation.__main__ import main

    main(context.args, "mmgem evaluate")


@app.command(**FORWARD)
def push(context: typer.Context) -> None:
    """Publish a model on the Hub, as push_to_hub.py does."""
    from .push import main

    main(context.args, "mmgem push")
