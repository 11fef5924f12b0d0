"""
The two losses of MM-GEM and their temperature: L = L_Emb + L_Gen, unweighted (paper, equation 4). And what a teacher
of texts adds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .negatives_mmgem import ALL_ALIKE, Negatives, choose_negatives, sigmoid_loss


BLOCK_SIZE = 2**22  # similarities of one direction that exist at a time: 16 MiB
MAX_LOGITS = 2**27  # next-token scores that a loss computes at a time: 512 MiB in float32


class LogitScale(nn.Module):
    """
    Makes logits of cosines: times 1 / tau, which is learned as its logarithm and clamped, plus the learned bias of a
    model that has one. A module with weights of one element, not scalars of the model, because PEFT trains and saves
    modules, and FSDP shards vectors.
    """

    def __init__(self, init_value: float, max_value: float, bias_init_value: float | None = None):
        super().__init__()
        self.init_value, self.max_value, self.bias_init_value = init_value, max_value, bias_init_value
        self.weight = nn.Parameter(torch.tensor([float(init_value)]))
        self.bias = None if bias_init_value is None else nn.Parameter(torch.tensor([float(bias_init_value)]))

    def init_weights(self) -> None:
        """Sets what no checkpoint has set."""
        init.constant_(self.weight, self.init_value)
        if self.bias is not None and self.bias_init_value is not None:
            init.constant_(self.bias, self.bias_init_value)

    def _apply(self, fn: Any, recurse: bool = True) -> "LogitScale":
        """Moves to a device; `.to(torch.bfloat16)` leaves weights float32, or 1 / tau = 14.29 would be 14.24."""
        exact = {name: weight.detach() for name, weight in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, weight in self.named_parameters():
            if exact[name].dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16):
                weight.data = exact[name].to(weight.device)
        return self

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamps the weight itself. Above the limit it has no gradient, so it could not come back."""
        self.weight.clamp_(max=self.max_value)

    @property
    def scale(self) -> torch.Tensor:
        """1 / tau, a float32 scalar."""
        return self.weight[0].float().clamp(max=self.max_value).exp()

    def forward(self, cosines: torch.Tensor) -> torch.Tensor:
        """Logits of cosines of any shape, float32."""
        logits = cosines * self.scale
        return logits if self.bias is None else logits + self.bias[0].float()


def contrastive_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    logit_scale: torch.Tensor,
    all_queries: torch.Tensor | None = None,
    all_keys: torch.Tensor | None = None,
    offset: int = 0,
    pair_ids: torch.Tensor | None = None,
    all_pair_ids: torch.Tensor | None = None,
    dims: Sequence[int] = (),
    negative_keys: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    own_ids: torch.Tensor | None = None,
    negatives: Negatives = ALL_ALIKE,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    L_Emb = L_v2t + L_t2v (paper, equation 2): InfoNCE both ways, the plain sum. Each half is a mean over the rows.
    With `logit_bias` it is SigLIP's loss instead (Zhai et al., 2023, equation 1): every pair is a yes or a no.

    With the embeddings gathered from all processes (with gradient) as `all_*`, the local rows stand against all
    columns; averaged over processes of equal batch size this is the loss, and its gradient, of one process that holds
    the whole batch. A large matrix of similarities never exists whole: it is computed in blocks of rows, and again in
    the backward pass.

    Args:
        queries, keys (`torch.FloatTensor` of shape `(N, D)`): unit norm, row i belongs to row i: images and texts, in
            whichever order, or regions and phrases, or queries and targets.
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau.
        all_queries, all_keys (`torch.FloatTensor` of shape `(M, D)`, *optional*): the columns.
        offset (`int`): column of the first local row.
        pair_ids (`torch.LongTensor` of shape `(N, K)`, *optional*): K numbers by which the pairs are known, such as
            hashes of caption and image. A column of another pair that shares one of them with the row is left out,
            because it is no negative.
        all_pair_ids (`torch.LongTensor` of shape `(M, K)`, *optional*): those of the columns.
        dims (*optional*): shorter lengths, for Matryoshka embeddings (Kusupati et al., 2022): the loss is then the
            mean of those at each length and at D.
        negative_keys (`torch.FloatTensor` of shape `(L, D)`, *optional*): hard negatives, as more columns of the
            queries.
        negative_ids (`torch.LongTensor` of shape `(L,)`, *optional*): the numbers by which these are known.
        own_ids (`torch.LongTensor` of shape `(N, C)`, *optional*): those of all keys that belong to a query, which are
            no hard negatives of it; by default its `pair_ids`.
        negatives (*optional*): which of the columns count as negatives, and how much. In SigLIP's loss this goes by
            the queries.
        logit_bias (`torch.FloatTensor`, scalar, *optional*): b, added to the scaled cosines.

    Returns:
        `torch.FloatTensor`, scalar, in nats.
    """
    all_queries = queries if all_queries is None else all_queries
    all_keys = keys if all_keys is None else all_keys
    all_pair_ids = pair_ids if all_pair_ids is None else all_pair_ids
    own_ids = pair_ids if own_ids is None else own_ids
    if dims:

        def loss_at(dim: int) -> torch.Tensor:
            return contrastive_loss(
                queries=shortened(queries, dim),
                keys=shortened(keys, dim),
                logit_scale=logit_scale,
                all_queries=shortened(all_queries, dim),
                all_keys=shortened(all_keys, dim),
                offset=offset,
                pair_ids=pair_ids,
                all_pair_ids=all_pair_ids,
                negative_keys=None if negative_keys is None else shortened(negative_keys, dim),
                negative_ids=negative_ids,
                own_ids=own_ids,
                negatives=negatives,
                logit_bias=logit_bias,
            )

        return torch.stack([loss_at(dim) for dim in (*dims, queries.shape[-1])]).mean()
    columns_of_rows = torch.arange(len(queries), device=queries.device) + offset

    def loss_of(block: slice) -> torch.Tensor:
        """Both cross-entropies, or SigLIP's loss, summed over a block of rows."""
        targets, duplicates = columns_of_rows[block], None
        if pair_ids is not None and all_pair_ids is not None:
            duplicates = _share_a_number(pair_ids[block], all_pair_ids).scatter_(1, targets[:, None], False)
        of_queries = similarity_logits(queries[block], all_keys, logit_scale, duplicates)
        if negative_keys is not None:
            is_own = None
            if own_ids is not None and negative_ids is not None:
                is_own = _share_a_number(own_ids[block], negative_ids[:, None].expand(-1, own_ids.shape[1]))
            hard = similarity_logits(queries[block], negative_keys, logit_scale, is_own)
            of_queries = torch.cat([of_queries, hard], 1)
        forth = choose_negatives(of_queries, targets, logit_scale, negatives)
        if logit_bias is not None:
            return sigmoid_loss(*forth, logit_bias)
        of_keys = similarity_logits(keys[block], all_queries, logit_scale, duplicates)
        back = choose_negatives(of_keys, targets, logit_scale, negatives)
        return F.cross_entropy(*forth, reduction="sum") + F.cross_entropy(*back, reduction="sum")

    count = len(all_keys) + (0 if negative_keys is None else len(negative_keys))
    return _sum_of_blocks(loss_of, len(queries), count) / len(queries)


def _sum_of_blocks(loss_of: Callable[[slice], torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The sum of a loss over rows, of which many are computed block by block, and again in the backward pass."""
    count = max(1, BLOCK_SIZE // columns)
    if rows <= count:
        return loss_of(slice(0, rows))
    blocks = [slice(start, start + count) for start in range(0, rows, count)]
    losses = [checkpoint(loss_of, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.stack(losses).sum()


def shortened(embeds: torch.Tensor, dim: int) -> torch.Tensor:
    """The first `dim` numbers of `(…, D)`, with unit norm; at full length the same tensor."""
    return embeds if dim == embeds.shape[-1] else F.normalize(embeds[..., :dim], dim=-1)


def _share_a_number(ids: torch.Tensor, other_ids: torch.Tensor) -> torch.Tensor:
    """`(N, M)`: whether rows of `(N, K)` and `(M, K)` have the same number in a column."""
    shared = torch.zeros(len(ids), len(other_ids), dtype=torch.bool, device=ids.device)
    for numbers, others in zip(ids.unbind(-1), other_ids.unbind(-1)):
        shared |= numbers[:, None] == others
    return shared


def relational_distillation(
    embeds: torch.Tensor,
    teacher_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    all_embeds: torch.Tensor | None = None,
    all_teacher_embeds: torch.Tensor | None = None,
    offset: int = 0,
    ids: torch.Tensor | None = None,
    all_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    KL(teacher || student) of the row-wise softmax of their similarities (UniME's stage 1, arXiv 2504.17432, equation
    1; the dimensions of both may differ). A mean over the rows; each row's similarity with itself, which says nothing,
    is left out. Computed in blocks of rows, as [`contrastive_loss`].

    Args:
        embeds (`torch.FloatTensor` of shape `(N, D)`), teacher_embeds (`(N, E)`): unit norm, of the same items.
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau, of both.
        all_embeds (`(M, D)`), all_teacher_embeds (`(M, E)`, *optional*): the columns, gathered from all processes.
        offset: column of the first row.
        ids (`torch.LongTensor` of shape `(N,)`, *optional*): numbers by which the items are known: columns with the
            row's number are the row once more, and left out too.
        all_ids (`(M,)`, *optional*): those of the columns.

    Returns:
        `torch.FloatTensor`, scalar, in nats.
    """
    all_embeds = embeds if all_embeds is None else all_embeds
    all_teacher_embeds = teacher_embeds if all_teacher_embeds is None else all_teacher_embeds
    all_ids = ids if all_ids is None else all_ids
    places = torch.arange(len(all_embeds), device=embeds.device)

    def loss_of(block: slice) -> torch.Tensor:
        own = places[offset : offset + len(embeds)][block, None] == places
        if ids is not None and all_ids is not None:
            own |= ids[block, None] == all_ids
        # Without an infinity in what follows, whose gradient would be NaN.
        log_student, log_teacher = (
            similarity_logits(rows[block], columns, logit_scale, own).log_softmax(1).masked_fill(own, 0.0)
            for rows, columns in ((embeds, all_embeds), (teacher_embeds, all_teacher_embeds))
        )
        return (log_teacher.exp() * (log_teacher - log_student)).sum()

    return _sum_of_blocks(loss_of, len(embeds), len(all_embeds)) / len(embeds)


def similarity_logits(
    queries: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor, left_out: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Scaled cosine similarities `(N, M)` in float32 at least, under autocast too: at 1 / tau = 100 the eight bits of
    bfloat16 leave steps of half a nat. -inf where `left_out` `(N, M)` is true.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        logits = logit_scale.to(dtype) * queries.to(dtype) @ keys.to(dtype).T
    return logits if left_out is None else logits.masked_fill(left_out, -torch.inf)


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Next-token scores `(…, vocab_size)`, scaled as Granite (division), Cohere (factor) and Gemma2 (soft cap) do."""
    if getattr(text_config, "logits_scaling", None) is not None:
        logits = logits / text_config.logits_scaling
    if getattr(text_config, "logit_scale", None) is not None:
        logits = logits * text_config.logit_scale
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def caption_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    L_Gen (paper, equation 3): next-token cross-entropy of the caption; the mean over caption tokens is our
    reading.

    Args:
        logits (`torch.FloatTensor` of shape `(N, vocab_size)`): predictions of the tokens in `targets`.
        targets (`torch.LongTensor` of shape `(N,)`): the tokens that follow.
        num_items_in_batch (`int` or scalar tensor, *optional*): divides the sum instead of N, if the mean runs over
            more than this call sees (gradient accumulation, several processes).

    Returns:
        `torch.FloatTensor`, scalar, in nats per token; 0 (with a graph) without targets.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)


def caption_loss_of_states(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    label_positions: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    L_Gen of hidden states. The head runs only where there is something to predict, and computes many logits in parts.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(B, T, H)`).
        labels (`torch.LongTensor` of shape `(B, T)`): tokens in their own places, -100 elsewhere.
        logits_of: the head, from `(N, H)` to `(N, vocab_size)`.
        vocab_size: of the head.
        label_positions (`torch.LongTensor` of shape `(L,)`, *optional*): indices into `labels.flatten()` of all labels
            that are not -100.
        num_items_in_batch (`int` or scalar tensor, *optional*): see [`caption_loss`].
    """
    if label_positions is None:
        is_target = F.pad(labels[:, 1:].ne(-100), (1, 0))  # nothing predicts the first token
        label_positions = is_target.flatten().nonzero()[:, 0]
    targets = labels.flatten()[label_positions].to(hidden_states.device)
    hidden_states = hidden_states.flatten(0, 1)[label_positions.to(hidden_states.device) - 1]
    count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch

    def loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return caption_loss(logits_of(hidden_states), targets, count)

    tokens = max(1, MAX_LOGITS // vocab_size)
    # In a compiled graph each number of parts would be another graph.
    if torch.compiler.is_compiling() or len(targets) <= tokens:
        return loss(hidden_states, targets)
    # In training each part's logits are computed again in the backward pass, instead of being kept.
    parts = zip(hidden_states.split(tokens), targets.split(tokens))
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


__all__ = [
    "LogitScale",
    "caption_loss",
    "caption_loss_of_states",
    "contrastive_loss",
    "relational_distillation",
    "scale_logits",
    "shortened",
    "similarity_logits",
]
