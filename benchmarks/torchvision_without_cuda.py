"""
To be imported first. Beside a torch without CUDA the compiled part of torchvision does not load, and its Python part
stops for want of two operators that nothing here calls: declared, they may be missing. open_clip needs the transforms.
"""

import torch


if not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
