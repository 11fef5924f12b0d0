"""Two text sides beside the same vision tower: MM-GEM's language model, and a text tower as CLIP has it."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.collator import MODEL_INPUTS, PairCollator
from mmgem.evaluation.embedding import embed_images, embed_texts
from mmgem.modeling_mmgem import contrastive_loss
from mmgem.training.stages import freeze_parameters


BATCH = 100  # of evaluation
CONTEXT_LENGTH = 77  # of CLIP


class LanguageModelSide:
    """MM-GEM as it is, without captions."""

    lengths = (50, CONTEXT_LENGTH, 200)

    def __init__(self, model: MMGEMModel, processor: MMGEMProcessor):
        self.model, self.processor = model.train(), processor
        freeze_parameters(model, "contrastive")
        self.collate = PairCollator(processor, "contrastive", pack_length=256)

    def trained(self) -> nn.Module:
        return self.model

    def clamp(self) -> None:
        with torch.no_grad():
            self.model.logit_scale.weight.clamp_(max=self.model.config.logit_scale_max_value)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        outputs = self.model(**inputs, return_loss=False, logits_to_keep=1)
        embeds = outputs.text_embeds[batch["text_index"]], outputs.image_embeds
        return contrastive_loss(*embeds, outputs.logit_scale, pair_ids=batch["pair_ids"])

    def embed_texts(self, texts: list[str], length: int) -> torch.Tensor:
        return embed_texts(self.model.eval(), self.processor, texts, BATCH, length)

    def embed_images(self, images: list[Any]) -> torch.Tensor:
        self.model.eval()
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return torch.cat([embed_images(self.model, self.processor, part) for part in parts])

    def text_parameters(self) -> int:
        """Of the text side, token embeddings and projection included."""
        side = (self.model.language_model, self.model.text_projection)
        return sum(p.numel() for module in side for p in module.parameters() if p.requires_grad)


class ClipTextSide(LanguageModelSide):
    """
    The same vision tower and h1 beside CLIP's text tower: causal, 77 tokens, the state at the end of the text; as many
    layers, width and heads as the language model, and as many weights.
    """

    lengths = (CONTEXT_LENGTH,)

    def __init__(self, model: MMGEMModel, processor: MMGEMProcessor):
        super().__init__(model, processor)
        text = model.config.text_config
        self.end = processor.tokenizer.convert_tokens_to_ids("[EMB]")
        self.text_model = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=3 * text.intermediate_size // 2,  # a gated MLP has three matrices
                num_hidden_layers=text.num_hidden_layers,
                num_attention_heads=text.num_attention_heads,
                max_position_embeddings=CONTEXT_LENGTH,
                projection_dim=model.config.projection_dim,
                hidden_act="gelu",
                eos_token_id=self.end,
                bos_token_id=text.bos_token_id,
                pad_token_id=text.pad_token_id,
            )
        )
        # As the language model starts: transformers' 0.02 would leave these widths almost blind at first.
        for module in self.text_model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
        modules = {"vision": model.vision_model, "h1": model.visual_projection, "scale": model.logit_scale}
        self.parts = nn.ModuleDict({**modules, "text": self.text_model})
        read = PairCollator(processor, "contrastive")
        self.collate = lambda examples: {
            **{name: value for name, value in read(examples).items() if name in ("pixel_values", "pair_ids")},
            **self._tokens([example["caption"] for example in examples]),
        }

    def trained(self) -> nn.Module:
        return self.parts

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        options = {"max_length": CONTEXT_LENGTH, "truncation": True, "padding_side": "right"}
        return dict(self.processor(text=texts, return_tensors="pt", **options))

    def _embed(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return normalize(self.text_model(**inputs).text_embeds, dim=-1)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        images = normalize(self.model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
        scale = self.model.logit_scale.scale
        return contrastive_loss(self._embed(batch), images, scale, pair_ids=batch["pair_ids"])

    @torch.inference_mode()
    def embed_texts(self, texts: list[str], length: int) -> torch.Tensor:
        self.text_model.eval()
        return torch.cat([self._embed(self._tokens(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)])

    def text_parameters(self) -> int:
        return sum(p.numel() for p in self.text_model.parameters())
