"""The fixtures of the library's tests."""

from ..library.conftest import checkpoint, photos  # noqa: F401
