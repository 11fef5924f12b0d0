"""PoolAggregator: from a map of patch features to one vector per image, box or mask. No parameters."""

import torch
from torch import nn


def box_weights(
    start: torch.Tensor, end: torch.Tensor, cells: int, bins: int, sampling_ratio: int | None = None
) -> torch.Tensor:
    """
    RoIAlign's weights along one axis (they are separable).

    Every bin of an interval is the mean of `sampling_ratio` equally spaced bilinear samples, with torchvision's
    `aligned=True` convention: the centre of cell c lies at coordinate c + 0.5, a sample more than one cell beyond the
    edge counts as zero.

    Args:
        start, end (`torch.FloatTensor` of shape `(...)`): the interval, in cells (0 is the edge of the first one).
        cells: number of cells along the axis.
        bins: number of bins the interval is cut into.
        sampling_ratio: samples per bin; by default enough that an interval over the whole axis samples every cell,
            so that the whole image's box is the exact mean.

    Returns:
        `torch.FloatTensor` of shape `(..., bins, cells)`; rows sum to 1 while the interval lies on the map.
    """
    samples = sampling_ratio or -(-cells // bins)
    offsets = (torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5) / (bins * samples)
    points = start[..., None] - 0.5 + (end - start)[..., None] * offsets
    on_map = (points >= -1) & (points <= cells)
    distance = points.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device, dtype=start.dtype)
    hat = (1 - distance.abs()).clamp(min=0) * on_map[..., None]
    return hat.unflatten(-2, (bins, samples)).mean(-2)


class PoolAggregator(nn.Module):
    """
    pooled = A V: every pooling is a weight matrix A over the P patches (paper: PoolAggregator, equations 5 to 7).

    Args:
        patch_size (`int`): pixels per side of a patch; boxes and masks come in pixels of `pixel_values`.
        sampling_ratio (`int`, *optional*): see [`box_weights`].
    """

    def __init__(self, patch_size: int, sampling_ratio: int | None = None):
        super().__init__()
        self.patch_size = patch_size
        self.sampling_ratio = sampling_ratio

    def forward(
        self,
        patch_features: torch.Tensor,
        grid: tuple[int, int],
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        grid_size: int = 1,
    ) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.FloatTensor` of shape `(B, P, C)`): V, row by row of the map.
            grid: patches along height and width; their product is P.
            boxes (`torch.FloatTensor` of shape `(B, R, 4)`, *optional*): `[x0, y0, x1, y1]` in pixels.
            masks (`torch.Tensor` of shape `(B, R, height, width)`, *optional*): a region's weight per pixel.
            grid_size (`int`): k, a box gives k x k vectors.

        Returns:
            `torch.FloatTensor` of shape `(B, 1, C)` for whole images, `(B, R * k * k, C)` for boxes (region by region,
            then row by row of its k x k grid), `(B, R, C)` for masks.

        Raises:
            ValueError: for boxes and masks at once, or masks with k above 1.
        """
        if boxes is None and masks is None:
            return patch_features.mean(1, keepdim=True)
        if boxes is not None and masks is not None:
            raise ValueError("A region is a box or a mask: pass `boxes` or `masks`, not both.")
        if boxes is not None:
            weights = self.weights_of_boxes(boxes, grid, grid_size)
        else:
            if grid_size != 1:
                raise ValueError(f"A mask pools into one vector, but region_grid_size is {grid_size}; pass boxes.")
            assert masks is not None
            weights = self.weights_of_masks(masks)
        return weights.to(patch_features.dtype) @ patch_features

    def weights_of_boxes(self, boxes: torch.Tensor, grid: tuple[int, int], grid_size: int = 1) -> torch.Tensor:
        """RoIAlign as a matrix, A = Wy (x) Wx: `(B, R, 4)` pixels to `(B, R * k * k, P)`, computed in float32."""
        x0, y0, x1, y1 = (boxes.to(torch.promote_types(boxes.dtype, torch.float32)) / self.patch_size).unbind(-1)
        rows = box_weights(y0, y1, grid[0], grid_size, self.sampling_ratio)
        columns = box_weights(x0, x1, grid[1], grid_size, self.sampling_ratio)
        weights = torch.einsum("brih,brjw->brijhw", rows, columns)
        return weights.flatten(4).flatten(1, 3)

    def weights_of_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """Area of the mask per patch, normalised: `(B, R, height, width)` to `(B, R, P)`; an empty mask gives 0."""
        masks = masks if masks.is_floating_point() else masks.float()
        area = nn.functional.avg_pool2d(masks, self.patch_size).flatten(2)
        return area / area.sum(-1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)


__all__ = ["PoolAggregator", "box_weights"]
