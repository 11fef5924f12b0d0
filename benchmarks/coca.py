"""open_clip's CoCa (Yu et al., 2022) with the tokenizer, images and tower sizes of a model of ours."""

# isort: off
import torchvision_without_cuda  # noqa: F401
# isort: on

import open_clip
import torch

from mmgem import MMGEMProcessor


def build_coca(
    width: int,
    heads: int,
    vision: dict[str, int],
    text_layers: int,
    decoder_layers: int,
    processor: MMGEMProcessor,
    context_length: int,
    queries: int = 256,
) -> torch.nn.Module:
    """
    open_clip's coca_ViT-B-32 in other sizes. A layer of its decoder is two blocks: one attends to the words, one to
    the image.

    Args:
        vision: `layers`, `heads`, `image_size` and `patch_size` of the ViT.
        queries: of the attentional pooler: the embedding and the visual tokens; open_clip's default is 256.
    """
    pad_id = processor.tokenizer.pad_token_id
    text = {"context_length": context_length, "vocab_size": len(processor.tokenizer), "width": width, "heads": heads}
    sizes = {name: vision[name] for name in ("layers", "image_size", "patch_size")}
    model = open_clip.coca_model.CoCa(
        embed_dim=width,
        multimodal_cfg={**text, "layers": decoder_layers, "attn_pooler_heads": heads},
        text_cfg={**text, "layers": text_layers, "embed_cls": True, "output_tokens": True, "pad_id": pad_id},
        vision_cfg={
            **sizes,
            "width": width,
            "head_width": width // vision["heads"],
            "attentional_pool": True,
            "attn_pooler_heads": heads,
            "attn_pooler_queries": queries,
            "output_tokens": True,
        },
        pad_id=pad_id,
    )
    model.text.correct_cls_mask = True  # by default one padding token is seen
    torch.nn.init.normal_(model.text_decoder.text_projection, std=width**-0.5)  # the class leaves it as it is
    return model.train()


def coca_texts(processor: MMGEMProcessor, captions: list[str]) -> torch.Tensor:
    """ "BOS caption EOS" `(B, L)`: CoCa predicts the caption and EOS, as we do."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    texts = tokenizer(captions, padding=True, return_tensors="pt", split_special_tokens=True)["input_ids"]
    texts[texts == tokenizer.convert_tokens_to_ids("[EMB]")] = tokenizer.eos_token_id
    return texts[:, : processor.max_length]


def fix_class_position(model: torch.nn.Module) -> None:
    """
    The class token behind a text gets the last position, however long the text is. In open_clip it gets the one after
    the batch's longest, so that texts which are not padded to the context length are embedded otherwise in other
    company.
    """
    text = model.text
    embeds = text._embeds

    def embeds_in_any_company(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        states, mask = embeds(ids)
        positions = text.positional_embedding
        moved = states[:, -1:] - positions[states.shape[1] - 1] + positions[-1]
        return torch.cat([states[:, :-1], moved], 1), mask

    text._embeds = embeds_in_any_company
