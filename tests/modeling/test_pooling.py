"""PoolAggregator against the definition of RoIAlign, written out as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem import PoolAggregator


PATCH = 8


def features_map(height=5, width=7, channels=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, height * width, channels, generator=generator, dtype=dtype)


def bilinear(grid, y, x):
    """torchvision's rule: zero beyond one cell outside, clamped to the map inside of that."""
    height, width, _ = grid.shape
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(grid.shape[-1], dtype=grid.dtype)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    return (
        (1 - fy) * (1 - fx) * grid[y0, x0]
        + (1 - fy) * fx * grid[y0, x1]
        + fy * (1 - fx) * grid[y1, x0]
        + fy * fx * grid[y1, x1]
    )


def roi_align_by_definition(grid, box, bins, samples):
    x0, y0, x1, y1 = (c / PATCH - 0.5 for c in box)
    bin_height, bin_width = (y1 - y0) / bins, (x1 - x0) / bins
    out = []
    for i in range(bins):
        for j in range(bins):
            values = [
                bilinear(
                    grid,
                    y0 + i * bin_height + (a + 0.5) * bin_height / samples,
                    x0 + j * bin_width + (b + 0.5) * bin_width / samples,
                )
                for a in range(samples)
                for b in range(samples)
            ]
            out.append(torch.stack(values).mean(0))
    return torch.stack(out)


coordinate = st.floats(-20, 80, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    corners=st.tuples(coordinate, coordinate, coordinate, coordinate), k=st.integers(1, 3), samples=st.integers(1, 3)
)
def test_boxes_equal_the_definition(corners, k, samples):
    features = features_map()
    x0, x1 = sorted(corners[::2])
    y0, y1 = sorted(corners[1::2])
    box = [x0, y0, x1 + 1, y1 + 1]
    pool = PoolAggregator(PATCH, sampling_ratio=samples)
    pooled = pool(features, (5, 7), boxes=torch.tensor([[box]], dtype=torch.float64), grid_size=k)
    expected = roi_align_by_definition(features.reshape(5, 7, 3), box, k, samples)
    torch.testing.assert_close(pooled[0], expected, atol=1e-10, rtol=0)


def test_boxes_equal_torchvision():
    ops = pytest.importorskip(
        "torchvision.ops", reason="torchvision cannot be imported beside a CPU torch", exc_type=Exception
    )
    features = features_map()
    boxes = torch.tensor([[3.0, 5.0, 40.0, 30.0], [-10.0, -3.0, 70.0, 44.0]], dtype=torch.float64)
    expected = ops.roi_align(
        features.reshape(1, 5, 7, 3).permute(0, 3, 1, 2), [boxes], 2, 1 / PATCH, sampling_ratio=2, aligned=True
    )
    pooled = PoolAggregator(PATCH, 2)(features, (5, 7), boxes=boxes[None], grid_size=2)
    torch.testing.assert_close(pooled.reshape(2, 2, 2, 3), expected.permute(0, 2, 3, 1))


def test_whole_image_box_is_the_mean():
    features = features_map()
    pool = PoolAggregator(PATCH)
    mean = pool(features, (5, 7))
    torch.testing.assert_close(mean[:, 0], features.mean(1))
    whole = torch.tensor([[[0.0, 0.0, 7 * PATCH, 5 * PATCH]]], dtype=torch.float64)
    # 7 samples per axis on a 5 x 7 map: exact along the width, near along the height.
    square = features_map(6, 6)
    square_box = torch.tensor([[[0.0, 0.0, 6 * PATCH, 6 * PATCH]]], dtype=torch.float64)
    torch.testing.assert_close(pool(square, (6, 6), boxes=square_box)[:, 0], square.mean(1))
    torch.testing.assert_close(pool(features, (5, 7), boxes=whole)[:, 0], features.mean(1))


def test_shift_by_a_patch_shifts_the_features():
    grid = features_map(6, 6).reshape(6, 6, 3)
    pool = PoolAggregator(PATCH)
    box = torch.tensor([[[9.0, 17.0, 30.0, 29.0]]], dtype=torch.float64)
    shifted = torch.roll(grid, (1, 1), (0, 1))
    a = pool(grid.reshape(1, 36, 3), (6, 6), boxes=box, grid_size=2)
    b = pool(shifted.reshape(1, 36, 3), (6, 6), boxes=box + PATCH, grid_size=2)
    torch.testing.assert_close(a, b)


def test_flip_mirrors_the_bins():
    grid = features_map(6, 6).reshape(6, 6, 3)
    pool = PoolAggregator(PATCH)
    box = torch.tensor([[[9.0, 17.0, 30.0, 29.0]]], dtype=torch.float64)
    flipped_box = torch.tensor([[[48 - 30.0, 17.0, 48 - 9.0, 29.0]]], dtype=torch.float64)
    a = pool(grid.reshape(1, 36, 3), (6, 6), boxes=box, grid_size=2).reshape(2, 2, 3)
    b = pool(grid.flip(1).reshape(1, 36, 3), (6, 6), boxes=flipped_box, grid_size=2).reshape(2, 2, 3)
    torch.testing.assert_close(a, b.flip(1))


def test_mask_is_area_per_patch_and_near_its_box():
    features = features_map(6, 6)
    pool = PoolAggregator(PATCH)
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    mask[..., 8:24, 16:40] = True  # whole patches: rows 1-2, columns 2-4
    inside = features.reshape(6, 6, 3)[1:3, 2:5].reshape(-1, 3).mean(0)
    torch.testing.assert_close(pool(features, (6, 6), masks=mask)[0, 0], inside)
    half = torch.zeros(1, 1, 48, 48)
    half[..., :8, :12] = 1  # one whole patch and half of its neighbour
    expected = (features[0, 0] * 2 + features[0, 1]) / 3
    torch.testing.assert_close(pool(features, (6, 6), masks=half)[0, 0], expected)
    assert not pool(features, (6, 6), masks=torch.zeros(1, 1, 48, 48)).any()


def test_gradient_in_float64():
    features = features_map(3, 3, 2).requires_grad_()
    boxes = torch.tensor([[[3.0, 4.0, 17.0, 21.0]]], dtype=torch.float64)
    pool = PoolAggregator(PATCH)
    assert torch.autograd.gradcheck(lambda v: pool(v, (3, 3), boxes=boxes, grid_size=2), features)


def test_more_than_one_region_and_errors():
    features = features_map().repeat(2, 1, 1)
    pool = PoolAggregator(PATCH)
    boxes = torch.tensor([[[0.0, 0, 20, 20], [8, 8, 30, 30], [1, 2, 3, 4]]], dtype=torch.float64).repeat(2, 1, 1)
    together = pool(features, (5, 7), boxes=boxes, grid_size=2)
    assert together.shape == (2, 12, 3) and math.isfinite(together.sum())
    for r in range(3):
        torch.testing.assert_close(
            together[:, 4 * r : 4 * r + 4], pool(features, (5, 7), boxes=boxes[:, r : r + 1], grid_size=2)
        )
    masks = torch.ones(2, 1, 40, 56)
    with pytest.raises(ValueError, match="not both"):
        pool(features, (5, 7), boxes=boxes, masks=masks)
    with pytest.raises(ValueError, match="region_grid_size"):
        pool(features, (5, 7), masks=masks, grid_size=2)
