"""A library of images: embedded, searched by text and image, and captioned."""

from .encoding import encode
from .index import Hit, Index
from .loaded import LoadedModel
from .sources import SourceOptions


__all__ = ["Hit", "Index", "LoadedModel", "SourceOptions", "encode"]
