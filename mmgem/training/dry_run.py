"""What a run will take of each device, before it starts: two steps of the model on tensors without memory."""

import contextlib
import gc
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..configuration import MMGEMConfig
from ..data.arguments import DataArguments
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from ..modeling_mmgem.losses_mmgem import BLOCK_SIZE
from .arguments import DryRunArguments, MMGEMTrainingArguments
from .checks import check_cached_features
from .feature_cache import kept_grid_size
from .gradient_cache import Embeddings, cached_backward
from .memory import GIB, device_memory, empty_model
from .stages import make_optimizer


FILL = 0.95  # of packed rows
CUDA_CONTEXT = GIB  # roughly what CUDA and its libraries take
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "inputs")
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOP_FORMULAS = {  # torch has none for its attention on CPUs
    SDPA: lambda query, key, value, *_, **__: flop_counter.sdpa_flop_count(query, key, value),
    SDPA_BACKWARD: lambda gradient, *qkv, **__: flop_counter.sdpa_backward_flop_count(gradient, *qkv[:3]),
}


@dataclass
class Estimate:
    """Numbers of parameters, bytes by kind at the moment when most are taken, floating-point operations per step."""

    parameters: int
    trained: int
    memory: dict[str, int]
    flops: int


def estimate(
    config: MMGEMConfig, args: MMGEMTrainingArguments, data_args: DataArguments, dry_run: DryRunArguments
) -> Estimate:
    """
    Estimates one device's share of a run. The model and the optimizer take two steps on fake tensors, which have
    shapes, types and lifetimes, but no memory. Every mini-batch of a batch costs the same, so two of them suffice.
    """
    batch_size = args.per_device_train_batch_size
    mini_batch_size = min(args.mini_batch_size or batch_size, batch_size)
    simulated = min(-(-batch_size // mini_batch_size), 2)
    flops = flop_counter.FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    live = LiveTensors(config.text_config.vocab_size)
    with torch.device("meta"):  # PEFT cannot move its matrices among fake tensors
        model, parameters = empty_model(config, args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake_tensors(model)
        if args.cache_features:
            check_cached_features(model, data_args.augmentation_scale)
        if args.activation_checkpointing:
            model.activation_checkpointing_enable()
        optimizer = make_optimizer(args, model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in model.parameters():
            live.add(parameter, "weights")
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.add(p.grad, "gradients"))
        is_replicated = dry_run.dry_run_devices > 1 and not dry_run.dry_run_sharded
        buckets = [torch.empty_like(parameter) for parameter in trained if is_replicated]  # DistributedDataParallel's
        images = _images(model, args, batch_size)
        for kind, tensors in (("gradients", buckets), ("inputs", images.values())):
            for tensor in tensors:
                live.add(tensor, kind)
        step = _Step(model, args, data_args, dry_run)
        for _ in range(2):  # from the second step on the optimizer has its state
            live.peak.clear()
            with live, flops:
                step.backward({name: tensor[:mini_batch_size] for name, tensor in images.items()}, simulated)
                optimizer.step()
                optimizer.zero_grad()
            for value in tree_leaves(list(optimizer.state.values())):
                if isinstance(value, torch.Tensor):
                    live.add(value, "optimizer")
    memory = {kind: live.peak[kind] for kind in KINDS}
    if dry_run.dry_run_sharded:
        for kind in ("weights", "gradients", "optimizer"):
            memory[kind] //= dry_run.dry_run_devices
    similarities = 0 if args.objective == "caption" else batch_size**2 * dry_run.dry_run_devices
    # Two matrix products; backward takes twice as many, and blocks of rows compute them once more.
    contrastive = 4 * similarities * config.projection_dim * (4 if similarities > BLOCK_SIZE else 3)
    rest = (flops.get_total_flops() - contrastive) * batch_size // (simulated * mini_batch_size)
    return Estimate(
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in trained),
        memory=memory,
        flops=(rest + contrastive) * args.gradient_accumulation_steps,
    )


def _to_fake_tensors(model: torch.nn.Module) -> None:
    """As `to_empty`, but tied weights stay tied, and a module that two others hold, as PEFT's then, is no fault."""
    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.empty_like(parameter, device="cpu")
                made[parameter] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = None if parameter is None else made[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")


def _images(model: MMGEMModel, args: MMGEMTrainingArguments, batch_size: int) -> dict[str, torch.Tensor]:
    """The images of a batch: pixels, or what `cache_features` keeps of them."""
    config = model.config.vision_config
    if not args.cache_features:
        return {"pixel_values": torch.empty(batch_size, config.num_channels, config.image_size, config.image_size)}
    images = {"pooled_features": torch.empty(batch_size, model.visual_projection.in_features)}
    grid_size = kept_grid_size(model.config, args.objective)
    if grid_size > 1:
        images["patch_features"] = torch.empty(batch_size, grid_size, grid_size, config.hidden_size)
    return images


class _Step:
    """A step as the Trainer takes it, on batches with the shapes that the collator would give them."""

    def __init__(
        self, model: MMGEMModel, args: MMGEMTrainingArguments, data_args: DataArguments, dry_run: DryRunArguments
    ):
        self.model = model
        self.args = args
        self.devices = dry_run.dry_run_devices
        self.tokens = min(dry_run.dry_run_caption_tokens, data_args.max_length)
        self.max_length = data_args.max_length
        self.hard = int(data_args.negative_caption_column is not None)  # negatives beside each caption

    def backward(self, images: dict[str, torch.Tensor], mini_batches: int) -> None:
        """Takes the gradients of a batch of which `mini_batches` are simulated; `images` are those of one."""
        objective = self.args.objective
        if self.args.mini_batch_size:
            cached_backward(
                [{}] * mini_batches,
                lambda _: self.forward(images, with_captions=False)[0],
                self.contrastive_loss,
                lambda _: self.forward(images, with_captions=objective == "joint"),
                lambda loss: loss.backward(),
                contextlib.nullcontext,
            )
            return
        embeddings, loss = self.forward(images, with_captions=objective != "contrastive")
        if objective != "caption":
            contrastive = self.contrastive_loss(*embeddings)
            loss = contrastive if loss is None else loss + contrastive
        assert loss is not None
        loss.backward()

    def forward(self, images: dict[str, torch.Tensor], with_captions: bool) -> tuple[Embeddings, torch.Tensor | None]:
        """Runs the model's own forward; fake tensors of token ids and positions hold no values."""
        size = len(next(iter(images.values())))
        sentences = 0 if self.args.objective == "caption" else size * (1 + self.hard)
        captions = size if with_captions else 0
        rows, length = sentences + captions, self.max_length
        if self.args.packing:
            prompt = self.model.config.image_grid_size**2 + 1
            tokens = sentences * self.tokens + captions * (self.tokens + prompt)
            rows, length = max(1, round(tokens / FILL / self.args.pack_length)), self.args.pack_length
        ids = torch.zeros(rows, length, dtype=torch.long)
        inputs = {"position_ids": ids} if self.args.packing else {"attention_mask": torch.ones_like(ids)}
        if with_captions:
            positions = torch.zeros(size * (self.tokens - 1), dtype=torch.long)
            inputs.update(labels=ids, label_positions=positions)
        text_positions = torch.zeros(sentences, dtype=torch.long)
        precision = torch.float16 if self.args.fp16 else torch.bfloat16
        with torch.autocast("cpu", precision, enabled=self.args.bf16 or self.args.fp16):
            outputs = self.model(
                ids, text_positions=text_positions, return_loss=False, logits_to_keep=1, **images, **inputs
            )
        texts = outputs.text_embeds
        texts, hard = texts.split([size, size]) if self.hard else (texts, None)
        embeds = (outputs.image_embeds, texts, outputs.logit_scale, outputs.logit_bias, hard)
        return Embeddings(*embeds), outputs.caption_loss

    def contrastive_loss(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        hard: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """L_Emb of the whole batch, of which these embeddings are a part, over all devices."""
        batch_size = self.args.per_device_train_batch_size
        repeats = -(-batch_size // len(texts))
        if hard is not None:
            hard = hard.repeat(repeats * self.devices, 1)[: batch_size * self.devices]
        texts, images = (x.repeat(repeats, 1)[:batch_size] for x in (texts, images))
        ids = torch.zeros(batch_size, 2, dtype=torch.long)
        gathered = [torch.cat([x] * self.devices) if self.devices > 1 else x for x in (texts, images, ids)]
        return contrastive_loss(
            *(texts, images, scale, gathered[0], gathered[1], 0, ids, gathered[2]),
            dims=self.args.matryoshka_dims,
            negative_keys=hard,
            logit_bias=bias,
        )


class LiveTensors(TorchDispatchMode):
    """
    Adds up the bytes of all tensors that are alive, by kind, and keeps those of the moment when they were most.
    Tensors that were not added as another kind count as activations, or as logits if their last dimension is the
    vocabulary.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.sizes: dict[int, tuple[str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __enter__(self) -> "LiveTensors":
        gc.freeze()  # what is there already need not be searched for cycles
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
            gc.collect()  # cycles, which fake tensors and gradient checkpointing make
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
    """Returns the estimate as text: sizes, memory of a device, speed, and a warning where it will not fit."""
    try:
        plan = estimate(config, args, data_args, dry_run)
    except DataDependentOutputException as error:
        towers = f"'{config.vision_config.model_type}' and '{config.text_config.model_type}'"
        raise ValueError(
            f"The dry run has shapes without values, and {towers} computes with values: {error}. Leave out --dry_run."
        ) from error
    on_cuda = torch.cuda.is_available()
    memory = {
        **plan.memory,
        "CUDA" if on_cuda else "Python and libraries": CUDA_CONTEXT if on_cuda else psutil.Process().memory_info().rss,
    }
    total = sum(memory.values())
    available = dry_run.dry_run_memory * GIB if dry_run.dry_run_memory else device_memory()
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
        f"  {'total':22}{total / GIB:8.2f}  of {available / GIB:.1f}",
        "",
        f"{plan.flops / 1e12:,.2f} TFLOP per step and device; {86400 / seconds:,.0f} steps per day at "
        f"{dry_run.dry_run_mfu:.0%} of {tflops:,.2f} TFLOP/s",
    ]
    if total > available:
        lines.append(
            f"It will not fit: {total / GIB:.1f} GiB of {available / GIB:.1f}. Lower --mini_batch_size (or set it, "
            "lower than the batch), turn on --activation_checkpointing, train with --lora_rank, or freeze a tower."
        )
    return "\n".join(lines)


def measured_tflops(device: str, precision: torch.dtype) -> float:
    """Measures the best of some products of large matrices on this device."""
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=precision)
    product, best = torch.empty_like(matrix), float("inf")
    for _ in range(20):  # the first ones are slow
        start = time.perf_counter()
        torch.matmul(matrix, matrix, out=product)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
