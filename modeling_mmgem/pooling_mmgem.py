"""PoolAggregator: from a map of patch features to one vector per image, box or mask. No parameters."""

import torch
from torch import nn
from transformers.utils import torch_compilable_check


MAX_WEIGHTS = 2**24  # of A, or pixels of masks, that exist at a time: 64 MiB in float32


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
    numbers = torch.arange(bins * samples, device=start.device, dtype=start.dtype) + 0.5
    points = start[..., None] - 0.5 + (end - start)[..., None] * numbers / (bins * samples)
    on_map = (points >= -1) & (points <= cells)
    distance = points.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device, dtype=start.dtype)
    hat = (1 - distance.abs()).clamp(min=0) * on_map[..., None]
    return hat.unflatten(-2, (bins, samples)).mean(-2)


def bin_overlaps(is_inside: torch.Tensor, bins: int) -> torch.Tensor:
    """
    The interval from the first to the last True along an axis, cut into equal bins.

    Args:
        is_inside (`torch.BoolTensor` of shape `(..., length)`): pixels along the axis.

    Returns:
        `torch.FloatTensor` of shape `(..., bins, length)`: the share of each pixel that lies in each bin.
    """
    length = is_inside.shape[-1]
    first = is_inside.int().argmax(-1)
    last = length - is_inside.flip(-1).int().argmax(-1)
    steps = torch.arange(bins + 1, device=is_inside.device) / bins
    edges = first[..., None] + (last - first)[..., None] * steps
    pixels = torch.arange(length, device=is_inside.device)
    ends = torch.minimum(edges[..., 1:, None], pixels + 1)
    return (ends - torch.maximum(edges[..., :-1, None], pixels)).clamp(0, 1)


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
            boxes (`torch.FloatTensor` of shape `(B, R, 4)`, *optional*): `[x0, y0, x1, y1]` in pixels; clipped to the
                patches. Without boxes and masks there is one region, the whole image.
            masks (`torch.Tensor` of shape `(B, R, height, width)`, *optional*): a region's weight per pixel. Behind
                the last whole patch there are no features, so that pixels there count at its edge.
            grid_size (`int`): k, a region gives k x k vectors.

        Returns:
            `torch.FloatTensor` of shape `(B, R * k * k, C)`: region by region, each row by row of its k x k grid. Many
            regions are pooled in parts, so that A never exists whole.

        Raises:
            ValueError: for boxes and masks at once; for masks of another size than the image; for a negative,
                infinite or NaN weight.
        """
        if boxes is None and masks is None:
            if grid_size == 1:
                return patch_features.mean(1, keepdim=True)
            height, width = (cells * self.patch_size for cells in grid)
            boxes = patch_features.new_tensor([0, 0, width, height], dtype=torch.float32).expand(1, 1, 4)
        if boxes is not None and masks is not None:
            raise ValueError("A region is a box or a mask: pass `boxes` or `masks`, not both.")
        if masks is not None and tuple(side // self.patch_size for side in masks.shape[2:]) != tuple(grid):
            height, width = (cells * self.patch_size for cells in grid)
            raise ValueError(
                f"masks have the shape {tuple(masks.shape)}, but must be (images, regions, {height}, {width}), the "
                "size of pixel_values. The processor resizes masks with their images."
            )
        if masks is not None and masks.dtype != torch.bool:
            torch_compilable_check(
                ((masks >= 0) & (masks < torch.inf)).all(),
                "masks hold a negative, infinite or NaN weight. Pass booleans, such as logits > 0.",
            )
        regions = self._clipped(boxes, grid) if boxes is not None else masks
        assert regions is not None
        regions = regions.to(patch_features.device)
        # Masks are added up along one axis first: k numbers per pixel.
        weights_each = (
            patch_features.shape[1] * grid_size**2 if masks is None else masks.shape[-2:].numel() * grid_size
        )
        at_a_time = max(1, MAX_WEIGHTS // (len(patch_features) * weights_each))
        if regions.shape[1] <= at_a_time or torch.compiler.is_compiling():  # each number of parts is another graph
            parts = [regions]
        else:
            parts = list(regions.split(at_a_time, dim=1))
        pooled = []
        for part in parts:
            if boxes is None:
                weights = self.weights_of_masks(part, grid_size)
            else:
                weights = self.weights_of_boxes(part, grid, grid_size)
            pooled.append(weights.to(patch_features.dtype) @ patch_features)
        return torch.cat(pooled, 1)

    def _clipped(self, boxes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        height, width = (cells * self.patch_size for cells in grid)
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack([x, y], -1).flatten(-2)

    def _to_whole_patches(self, masks: torch.Tensor) -> torch.Tensor:
        for dim in (-2, -1):
            kept = masks.shape[dim] // self.patch_size * self.patch_size
            if kept < masks.shape[dim]:
                edge = masks.narrow(dim, kept - 1, masks.shape[dim] - kept + 1).amax(dim, keepdim=True)
                masks = torch.cat([masks.narrow(dim, 0, kept - 1), edge], dim)
        return masks

    def weights_of_boxes(self, boxes: torch.Tensor, grid: tuple[int, int], grid_size: int = 1) -> torch.Tensor:
        """RoIAlign as a matrix, A = Wy (x) Wx: `(B, R, 4)` pixels to `(B, R * k * k, P)`, computed in float32."""
        x0, y0, x1, y1 = (boxes.to(torch.promote_types(boxes.dtype, torch.float32)) / self.patch_size).unbind(-1)
        rows = box_weights(y0, y1, grid[0], grid_size, self.sampling_ratio)
        columns = box_weights(x0, x1, grid[1], grid_size, self.sampling_ratio)
        weights = torch.einsum("brih,brjw->brijhw", rows, columns)
        return weights.flatten(4).flatten(1, 3)

    def weights_of_masks(self, masks: torch.Tensor, grid_size: int = 1) -> torch.Tensor:
        """
        Area of the mask per patch, normalised: `(B, R, height, width)` to `(B, R * k * k, P)`; an empty mask gives 0.

        With k above 1 the box around the mask is cut into k x k bins, each with the part of the mask that it holds; a
        bin that holds nothing of it stands for the whole mask.
        """
        masks = self._to_whole_patches(masks.to(torch.promote_types(masks.dtype, torch.float32)))
        area = nn.functional.avg_pool2d(masks, self.patch_size).flatten(2)[..., None, :]
        weights = area / area.sum(-1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)
        if grid_size > 1:
            rows = bin_overlaps(masks.any(-1), grid_size).to(masks.dtype)
            columns = bin_overlaps(masks.any(-2), grid_size).to(masks.dtype)
            strips = (masks[..., None, :, :] * columns[..., None, :]).unflatten(-1, (-1, self.patch_size)).sum(-1)
            strips = strips.unflatten(-2, (-1, self.patch_size))  # (B, R, k, patches, pixels of a patch, patches)
            area = torch.einsum("brjpsq,brips->brijpq", strips, rows.unflatten(-1, (-1, self.patch_size)))
            area = area.flatten(4).flatten(2, 3)
            total = area.sum(-1, keepdim=True)
            weights = torch.where(total > 0, area / total.clamp(min=torch.finfo(area.dtype).tiny), weights)
        return weights.flatten(1, 2)


__all__ = ["PoolAggregator", "bin_overlaps", "box_weights"]
