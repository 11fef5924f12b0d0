"""The options of `from_pretrained` that say where the files of a tower are."""

from typing import Any


HUB_OPTIONS = ("revision", "subfolder", "token")
ELSEWHERE = {
    "dtype": "It is that of the whole model: pass dtype beside {name}",
    "torch_dtype": "It is that of the whole model: pass dtype beside {name}",
    "attn_implementation": "It is that of both towers: pass attn_implementation beside {name}",
    "quantization_config": "Quantize the finished model: AutoModel.from_pretrained(FOLDER, quantization_config=…)",
}


def checked_hub_options(options: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """
    The options of a tower's `from_pretrained`; `name` is "vision_kwargs" or "text_kwargs".

    Raises:
        ValueError: for an option that says nothing about where files are, by name, with where it belongs.
    """
    known = (*HUB_OPTIONS, "gguf_file") if name == "text_kwargs" else HUB_OPTIONS
    for option in options or {}:
        if option not in known:
            hint = ELSEWHERE.get(option, "Choose from " + ", ".join(known)).format(name=name)
            raise ValueError(f"{name} has no option {option!r}. {hint}.")
    return dict(options or {})


__all__ = ["checked_hub_options"]
