"""What a run will take of each device, told before it starts: two training steps on tensors without memory."""

import contextlib
import gc
import math
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights

from ..configuration import MMGEMConfig
from ..modeling_mmgem import MMGEMModel, caption_loss, contrastive_loss
from ..modeling_mmgem.losses_mmgem import BLOCK_SIZE, MAX_LOGITS
from .arguments import DataArguments, DryRunArguments, MMGEMTrainingArguments
from .gradient_cache import Embeddings, cached_backward
from .lora import add_lora
from .stages import freeze_parameters, make_optimizer


FILL = 0.95  # of packed rows
GIB = 2**30
CUDA_CONTEXT = GIB  # roughly what CUDA and its libraries take
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, used, statistics, and what these call cached files
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass
class Estimate:
    """Parameters in numbers, bytes by part at the moment when most are taken, floating-point operations per step."""

    parameters: int
    trained: int
    memory: dict[str, int]
    flops: int


def estimate(
    config: MMGEMConfig, args: MMGEMTrainingArguments, data_args: DataArguments, dry_run: DryRunArguments
) -> Estimate:
    """
    One device's share of a run with these options. Nothing is read or computed: tensors have shapes, types and
    lifetimes only, and an operation's cost is counted where it would run.

    Every mini-batch of a batch costs the same, so two of them are gone through.
    """
    batch_size = args.per_device_train_batch_size
    mini_batch_size = min(args.mini_batch_size or batch_size, batch_size)
    mini_batches = -(-batch_size // mini_batch_size)
    simulated = min(mini_batches, 2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda query, key, value, *_, **__: flop_counter.sdpa_flop_count(query, key, value),
        attention_backward: lambda gradient, query, key, value, *_, **__: flop_counter.sdpa_backward_flop_count(
            gradient, query, key, value
        ),
    }
    flops = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    live = LiveTensors(config.text_config.vocab_size)
    with torch.device("meta"), no_init_weights():
        model = MMGEMModel(config).train()
        parameters = model.num_parameters()
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha)
    freeze_parameters(model, args.objective, args.freeze)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move_from_meta(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(args, model)
        side = config.vision_config.image_size
        pixels = torch.empty(batch_size, config.vision_config.num_channels, side, side)
        live.add(pixels, "inputs")
        for parameter in model.parameters():
            live.add(parameter, "weights")
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.add(p.grad, "gradients"))
        # DistributedDataParallel's buckets.
        has_buckets = dry_run.dry_run_devices > 1 and not dry_run.dry_run_sharded
        buckets = [torch.empty_like(parameter) for parameter in trained if has_buckets]
        for bucket in buckets:
            live.add(bucket, "gradients")
        step = _Step(model, args, data_args, dry_run, pixels[:mini_batch_size], -(-mini_batches // simulated))
        for _ in range(2):  # from the second on the optimiser's state is there
            live.peak.clear()
            with live, flops:
                step.backward(simulated)
                optimizer.step()
                optimizer.zero_grad()
            for value in tree_leaves(list(optimizer.state.values())):
                if isinstance(value, torch.Tensor):
                    live.add(value, "optimizer")
    memory = dict(live.peak)
    if dry_run.dry_run_sharded:
        for kind in ("weights", "gradients", "optimizer"):
            memory[kind] = memory.get(kind, 0) // dry_run.dry_run_devices

    def contrastive(pairs: int) -> int:
        """Two products of matrices; backward twice that, and blocks once more."""
        similarities = pairs * pairs * dry_run.dry_run_devices if args.objective != "caption" else 0
        return 4 * similarities * config.projection_dim * (4 if similarities > BLOCK_SIZE else 3)

    pairs = simulated * mini_batch_size
    counted = flops.get_total_flops() - contrastive(pairs * step.contrastive_repeats)  # of the second step alone
    return Estimate(
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in trained),
        memory=memory,
        flops=(counted * batch_size // pairs + contrastive(batch_size)) * args.gradient_accumulation_steps,
    )


def check_memory(config: MMGEMConfig, args: MMGEMTrainingArguments) -> None:
    """
    Refuses a model that cannot fit into memory, before any of it is allocated. What activations take is left out: see
    [`estimate`].

    Raises:
        ValueError: with the bytes that are needed and those that are free.
    """
    with torch.device("meta"), no_init_weights():
        model = MMGEMModel(config)
        parameters = trained = model.num_parameters()
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha)
    freeze_parameters(model, args.objective, args.freeze)
    if args.stage == "1":
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    else:
        trained = 0  # an adapter beside the model is small
    needed, free = 4 * parameters, min(psutil.virtual_memory().available, container_memory()[1])
    if args.device.type == "cpu":
        states = 2 if "adam" in args.optim or args.kept_optimizer else 0  # the gradient is one more
        needed += 4 * trained * (1 + states)
    if needed > free:
        raise ValueError(
            f"A model of {parameters / 1e6:,.0f} M parameters ({trained / 1e6:,.0f} M trained) takes at least "
            f"{needed / GIB:.1f} GiB, but {free / GIB:.1f} GiB are free on this machine. Choose smaller towers, or "
            "train fewer weights (--lora_rank, --freeze); --dry_run tells what a run takes."
        )


def _move_from_meta(model: nn.Module) -> None:
    """To what tensors are made of here; what was shared stays shared."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in moved:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    moved[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    tensors[name] = moved[old]  # type: ignore[assignment]


class _Step:
    """Forward and backward of mini-batches with the shapes that the collator would give them."""

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        data_args: DataArguments,
        dry_run: DryRunArguments,
        pixels: torch.Tensor,
        contrastive_repeats: int,
    ):
        self.model = model
        self.args = args
        self.pixels = pixels
        self.devices = dry_run.dry_run_devices
        self.tokens = min(dry_run.dry_run_caption_tokens, data_args.max_length)
        self.max_length = data_args.max_length
        self.pack_length = data_args.pack_length if data_args.packing else 0
        self.contrastive_repeats = contrastive_repeats

    def backward(self, mini_batches: int) -> None:
        """As the Trainer goes about it."""
        objective = self.args.objective
        if self.args.mini_batch_size:
            cached_backward(
                [{}] * mini_batches,
                lambda _: self.forward(with_captions=False)[0],
                self.contrastive,
                lambda _: self.forward(with_captions=objective == "joint"),
                lambda loss: loss.backward(),
                contextlib.nullcontext,
            )
            return
        embeddings, loss = self.forward(with_captions=objective != "contrastive")
        losses = [] if loss is None else [loss]
        if objective != "caption":
            losses.append(self.contrastive(*embeddings))
        torch.stack(losses).sum().backward()

    def forward(self, with_captions: bool) -> tuple[Embeddings, torch.Tensor | None]:
        """As the model's own, without what depends on the values of its inputs."""
        model, size = self.model, len(self.pixels)
        rows, width = self.rows(with_captions)
        precision = torch.float16 if self.args.fp16 else torch.bfloat16
        with torch.autocast("cpu", precision, enabled=self.args.bf16 or self.args.fp16):
            images: Any = model.get_image_features(self.pixels).pooler_output
            inputs_embeds = model.get_input_embeddings()(torch.zeros(rows, width, dtype=torch.long))
            if with_captions:
                places = torch.zeros(rows, width, 1, dtype=torch.bool)
                tokens = model.caption_projection(images).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(places, tokens)
            positions = torch.zeros(rows, width, dtype=torch.long) if self.pack_length else None
            hidden_states = model._run_language_model(inputs_embeds, None, positions).last_hidden_state
            hidden_states = hidden_states.flatten(0, 1)
            texts = model.text_projection(hidden_states[:size])
            scale = model.logit_scale(torch.ones(()))
            loss = None
            if with_captions:
                targets = torch.zeros(size * (self.tokens - 1), dtype=torch.long)
                parts = -(-len(targets) // max(1, MAX_LOGITS // model.config.text_config.vocab_size))
                loss = self.caption_loss(hidden_states[: len(targets)], targets, parts)
        return (nn.functional.normalize(texts, dim=-1), nn.functional.normalize(images, dim=-1), scale), loss

    def caption_loss(self, hidden_states: torch.Tensor, targets: torch.Tensor, parts: int) -> torch.Tensor:
        """Many logits in parts, as the model has it."""

        def loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return caption_loss(self.model._logits(hidden_states), targets)

        if parts == 1:
            return loss(hidden_states, targets)
        chunks = zip(hidden_states.tensor_split(parts), targets.tensor_split(parts))
        return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def rows(self, with_captions: bool) -> tuple[int, int]:
        """Number and length of the rows that hold a mini-batch."""
        sentences = 0 if self.args.objective == "caption" else len(self.pixels)
        captions = len(self.pixels) if with_captions else 0
        if not self.pack_length:
            return sentences + captions, self.max_length
        tokens = sentences * self.tokens + captions * (self.tokens + 1)
        return max(1, round(tokens / FILL / self.pack_length)), self.pack_length

    def contrastive(self, texts: torch.Tensor, images: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """L_Emb of the whole batch, of which these are a part, over all devices."""
        texts, images = (x.float().repeat(self.contrastive_repeats, 1) for x in (texts, images))
        ids = torch.zeros(len(texts), 2, dtype=torch.long)
        all_texts, all_images, all_ids = texts, images, ids
        if self.devices > 1:
            all_texts, all_images, all_ids = (torch.cat([x] * self.devices) for x in (texts, images, ids))
        return contrastive_loss(texts, images, scale, all_texts, all_images, 0, ids, all_ids)


class LiveTensors(TorchDispatchMode):
    """
    The bytes of all tensors that are alive, by kind, and of the moment when they were most. What was not added as
    something else counts as activations, and as logits where its last dimension is the vocabulary.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.sizes: dict[int, tuple[str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __enter__(self) -> "LiveTensors":
        gc.freeze()  # what is there already need not be looked through for cycles
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                is_logits = tensor.ndim == 2 and tensor.shape[-1] == self.vocab_size
                self.add(tensor, "logits" if is_logits else "activations")
        if self.live.total() > self.peak.total():
            gc.collect()  # cycles of ours and of gradient checkpointing's, which hold no memory in a real run
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()
        return result

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts the tensor's memory as `kind`, whatever it counted as before."""
        storage = tensor.untyped_storage()
        if id(storage) in self.sizes:
            self.live[self.sizes[id(storage)][0]] -= storage.nbytes()
        else:
            weakref.finalize(storage, self._forget, id(storage))
        self.sizes[id(storage)] = (kind, storage.nbytes())
        self.live[kind] += storage.nbytes()

    def _forget(self, key: int) -> None:
        kind, size = self.sizes.pop(key)
        self.live[kind] -= size


def dry_run_report(
    config: MMGEMConfig, args: MMGEMTrainingArguments, data_args: DataArguments, dry_run: DryRunArguments
) -> str:
    """The estimate as text: sizes, what is taken of a device, speed, and a warning where it will not fit."""
    plan = estimate(config, args, data_args, dry_run)
    on_cuda = torch.cuda.is_available()
    memory = {
        kind: plan.memory.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "activations", "logits")
    }
    memory["inputs"] = plan.memory.get("inputs", 0)
    memory["CUDA" if on_cuda else "Python and libraries"] = (
        CUDA_CONTEXT if on_cuda else psutil.Process().memory_info().rss
    )
    total = sum(memory.values())
    there = dry_run.dry_run_memory * GIB if dry_run.dry_run_memory else _memory_of_this_device()
    precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    tflops = dry_run.dry_run_tflops or measured_tflops("cuda" if on_cuda else "cpu", precision)
    seconds = plan.flops / (tflops * 1e12 * dry_run.dry_run_mfu)
    pairs = args.per_device_train_batch_size * dry_run.dry_run_devices * args.gradient_accumulation_steps
    lines = [
        f"{plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained",
        f"{dry_run.dry_run_devices} device(s), {pairs:,} pairs a step, captions of "
        f"{dry_run.dry_run_caption_tokens} tokens",
        "",
        f"{'memory per device':24}{'GiB':>8}",
        *(f"  {kind:22}{size / GIB:8.2f}" for kind, size in memory.items()),
        f"  {'total':22}{total / GIB:8.2f}  of {there / GIB:.1f}",
        "",
        f"{plan.flops / 1e12:,.2f} TFLOP per step and device; {86400 / seconds:,.0f} steps per day at "
        f"{dry_run.dry_run_mfu:.0%} of {tflops:,.2f} TFLOP/s",
    ]
    if total > there:
        lines.append(
            f"It will not fit: {total / GIB:.1f} GiB of {there / GIB:.1f}. Lower --mini_batch_size (or set it, lower "
            "than the batch), turn on --activation_checkpointing, train with --lora_rank, or freeze a tower."
        )
    return "\n".join(lines)


def _memory_of_this_device() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(min(psutil.virtual_memory().total, container_memory()[0]))


def container_memory() -> tuple[float, float]:
    """
    Bytes that the container (cgroup v2 or v1) allows in all, and those that are left; infinite without a limit. Cached
    files do not count, since the kernel drops them when memory is short.
    """
    for limit_name, used_name, stat_name, cached_name in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or "max"
            limit, used = (int((CGROUP / name).read_text()) for name in (limit_name, used_name))
            stat = dict(line.split() for line in (CGROUP / stat_name).read_text().splitlines())
            return limit, limit - used + int(stat[cached_name])
    return math.inf, math.inf


def measured_tflops(device: str, precision: torch.dtype) -> float:
    """Of a product of large matrices on this device."""
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=precision)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
