"""A language model's tokenizer with three more tokens, a pad token, and [EMB] at the end of a text."""

from typing import Any

from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast


IMAGE_TOKEN = "<image>"
CAP_TOKEN = "[CAP]"
EMB_TOKEN = "[EMB]"
DOCUMENT_START = "<|endoftext|>"  # stands between the texts that GPT-2, Pythia, Qwen, SmolLM, … learned from
# `as_sentence` as a normalizer, for pipelines that call the tokenizer alone. Python strips U+001C to U+001F too.
NO_LETTERS = r"\A[\s\x00\x1c-\x1f]+|[\s\x00\x1c-\x1f]+\z|\x00"


def as_sentence(text: str) -> str:
    """
    Removes NUL and surrounding white space, as training, evaluation and the processor all do.

    Raises:
        ValueError: for half a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair, {text[error.start]!r}, is no character: {text[:40]!r}. Decode the text with its "
            "own encoding, or drop it."
        ) from error
    return text.replace("\0", "").strip()


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts its BOS in front of a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def opening_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    The token in front of every text; None for a tokenizer without a BOS and an EOS.

    Language models make the first token the sink of their attention (https://arxiv.org/abs/2309.17453) and lose much
    of what it says, which would be the image. It is the BOS where the tokenizer writes one; otherwise
    `<|endoftext|>` if there is this token, because the BOS of chat models (`<|im_start|>`) starts a turn, not a text;
    otherwise BOS, or EOS.
    """
    if not starts_with_bos(tokenizer) and DOCUMENT_START in tokenizer.get_vocab():
        return DOCUMENT_START
    return tokenizer.bos_token or tokenizer.eos_token


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids of the three tokens, by their names in [`MMGEMConfig`]."""
    names = {"image_token_id": IMAGE_TOKEN, "cap_token_id": CAP_TOKEN, "emb_token_id": EMB_TOKEN}
    vocabulary = tokenizer.get_vocab()
    return {name: vocabulary[token] for name, token in names.items()}


def ends_with_emb(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts [EMB] behind a text."""
    return tokenizer("a")["input_ids"][-1] == tokenizer.convert_tokens_to_ids(EMB_TOKEN)


def to_mmgem_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """
    The same vocabulary plus `<image>`, [CAP], [EMB] (and `<pad>` if there is no pad token), in a tokenizer whose
    post-processor writes "BOS text [EMB]". It takes `<image>` and [EMB] in a text for letters, and its normalizer
    does what [`as_sentence`] does.

    BOS becomes the [`opening_token`], and is always written.

    The result is of the generic class, because the classes of single models rebuild their post-processor when they
    are loaded, and would lose [EMB].

    Raises:
        ValueError: for a tokenizer without a `tokenizers` backend, or without an EOS token.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast backend (tokenizer.json), so it cannot append {EMB_TOKEN} "
            "itself; convert the tokenizer to a fast one first."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no EOS token, so captions would have no end; set tokenizer.eos_token to "
            "the token that ends a text."
        )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: str(token) for name in names if (token := getattr(tokenizer, name, None)) is not None}
    special["bos_token"] = str(opening_token(tokenizer))
    special.setdefault("pad_token", "<pad>")
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        split_special_tokens=True,
        **special,
    )
    result.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, CAP_TOKEN, EMB_TOKEN)],
        special_tokens=True,
    )
    backend = result.backend_tokenizer
    letters = normalizers.Replace(Regex(NO_LETTERS), "")
    backend.normalizer = normalizers.Sequence([letters, *([backend.normalizer] if backend.normalizer else [])])
    bos = result.bos_token
    ids = [(token, result.get_vocab()[token]) for token in (bos, EMB_TOKEN)]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A {EMB_TOKEN}", pair=f"{bos} $A $B {EMB_TOKEN}", special_tokens=ids
    )
    return result
