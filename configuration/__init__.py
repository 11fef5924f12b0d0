from .configuration_mmgem import MMGEMConfig


__all__ = ["MMGEMConfig"]
