"""PoolAggregator against the definition of RoIAlign, written out as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem import PoolAggregator
from mmgem.modeling_mmgem import pooling_mmgem


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
    pooled = pool.weights_of_boxes(torch.tensor([[box]], dtype=torch.float64), (5, 7), k) @ features
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
    pooled = PoolAggregator(PATCH, 2).weights_of_boxes(boxes[None], (5, 7), 2) @ features
    torch.testing.assert_close(pooled.reshape(2, 2, 2, 3), expected.permute(0, 2, 3, 1))


inside = st.floats(0, 44, allow_nan=False)
length = st.floats(0.5, 40, allow_nan=False)
pixel = st.integers(0, 40)


def box_of(x, y, width, height, side=48):
    """A box on a square map, one cell away from its far edges at least."""
    x, y = min(x, side - 9), min(y, side - 9)
    return torch.tensor([[[x, y, min(x + width, side - 8), min(y + height, side - 8)]]], dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(x=inside, y=inside, width=length, height=length, k=st.integers(1, 3), seed=st.integers(0, 9))
def test_shift_by_a_patch_shifts_the_features(x, y, width, height, k, seed):
    grid = features_map(6, 6, seed=seed).reshape(6, 6, 3)
    pool = PoolAggregator(PATCH)
    box = box_of(x, y, width, height)
    # Samples closer to the edge than half a cell are clamped to it, and would see another neighbour.
    box = box.clamp(PATCH / 2, 40 - PATCH / 2)
    shifted = torch.roll(grid, (1, 1), (0, 1))
    a = pool(grid.reshape(1, 36, 3), (6, 6), boxes=box, grid_size=k)
    b = pool(shifted.reshape(1, 36, 3), (6, 6), boxes=box + PATCH, grid_size=k)
    torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(x=inside, y=inside, width=length, height=length, k=st.integers(1, 3), axis=st.sampled_from([0, 1]))
def test_flip_mirrors_the_bins(x, y, width, height, k, axis):
    grid = features_map(6, 6).reshape(6, 6, 3)
    pool = PoolAggregator(PATCH)
    box = box_of(x, y, width, height)
    flipped = box.clone()
    near, far = (1, 3) if axis == 0 else (0, 2)
    flipped[..., near], flipped[..., far] = 48 - box[..., far], 48 - box[..., near]
    a = pool(grid.reshape(1, 36, 3), (6, 6), boxes=box, grid_size=k).reshape(k, k, 3)
    b = pool(grid.flip(axis).reshape(1, 36, 3), (6, 6), boxes=flipped, grid_size=k).reshape(k, k, 3)
    torch.testing.assert_close(a, b.flip(axis))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 9), k=st.integers(1, 4))
def test_whole_image_box_is_near_the_mean_and_its_bins_share_it(rows, columns, seed, k):
    features = features_map(rows, columns, seed=seed)
    whole = torch.tensor([[[0.0, 0.0, columns * PATCH, rows * PATCH]]], dtype=torch.float64)
    pool = PoolAggregator(PATCH)
    torch.testing.assert_close(pool(features, (rows, columns), boxes=whole)[:, 0], features.mean(1))
    mask = torch.ones(1, 1, rows * PATCH, columns * PATCH)
    torch.testing.assert_close(pool(features, (rows, columns), masks=mask)[:, 0], features.mean(1))
    bins = pool(features, (rows, columns), masks=mask, grid_size=k)
    torch.testing.assert_close(bins.mean(1), features.mean(1), atol=1e-6, rtol=0)  # masks are float32


@settings(max_examples=40, deadline=None)
@given(corner=st.tuples(pixel, pixel), width=st.integers(3, 48), height=st.integers(3, 48), k=st.integers(1, 3))
def test_mask_of_a_box_is_near_the_box(corner, width, height, k):
    """On a smooth map: the mask takes the patch that a pixel lies in, the box interpolates between two of them."""
    ramp = torch.linspace(0, 1, 6, dtype=torch.float64)
    grid = torch.stack([ramp[:, None].expand(6, 6), ramp.expand(6, 6)], -1)
    x, y = corner
    x1, y1 = min(x + width, 48), min(y + height, 48)
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    mask[..., y:y1, x:x1] = True
    pool = PoolAggregator(PATCH)
    box = torch.tensor([[[x, y, x1, y1]]], dtype=torch.float64)
    of_box = pool(grid.reshape(1, 36, 2), (6, 6), boxes=box, grid_size=k)
    of_mask = pool(grid.reshape(1, 36, 2), (6, 6), masks=mask, grid_size=k)
    assert (of_box - of_mask).abs().max() <= 0.5 * 0.2 + 1e-6  # half of the step from one cell to the next


def test_mask_is_area_per_patch():
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
    for k in (1, 2):
        assert not pool(features, (6, 6), masks=torch.zeros(1, 1, 48, 48), grid_size=k).any()


def test_bins_of_a_mask_by_hand():
    """An L of pixels whose box is 4 x 6: each bin holds its part of the L, the empty one stands for all of it."""
    features = features_map(2, 2, channels=2)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 6:10, 5] = True  # the long side, rows 6 to 9, in column 5
    mask[..., 9, 5:11] = True  # the short side, columns 5 to 10, in row 9
    pooled = PoolAggregator(PATCH)(features, (2, 2), masks=mask, grid_size=2)[0]
    top_left, bottom_left, bottom_right = features[0, 0], features[0, 2], features[0, 3]
    # Bins: rows 6-7 and 8-9, columns 5-7 and 8-10; patches end behind row 7 and column 7.
    whole = (2 * top_left + 4 * bottom_left + 3 * bottom_right) / 9
    expected = torch.stack([top_left, whole, bottom_left, bottom_right])
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_gradient_in_float64(k):
    features = features_map(3, 3, 2).requires_grad_()
    boxes = torch.tensor([[[3.0, 4.0, 17.0, 21.0], [-3.0, 0.0, 30.0, 9.0]]], dtype=torch.float64)
    masks = torch.zeros(1, 2, 24, 24, dtype=torch.float64)
    masks[0, 0, 3:9, 2:20] = masks[0, 1, 10:, 10:] = 1
    pool = PoolAggregator(PATCH)
    assert torch.autograd.gradcheck(lambda v: pool(v, (3, 3), boxes=boxes, grid_size=k), features)
    assert torch.autograd.gradcheck(lambda v: pool(v, (3, 3), masks=masks, grid_size=k), features)


def test_regions_do_not_know_of_each_other_and_come_in_parts(monkeypatch):
    features = features_map().repeat(2, 1, 1)
    pool = PoolAggregator(PATCH)
    boxes = torch.tensor([[[0.0, 0, 20, 20], [8, 8, 30, 30], [1, 2, 3, 4]]], dtype=torch.float64).repeat(2, 1, 1)
    masks = torch.rand(2, 3, 40, 56, dtype=torch.float64) > 0.5
    together = pool(features, (5, 7), boxes=boxes, grid_size=2)
    of_masks = pool(features, (5, 7), masks=masks, grid_size=2)
    assert together.shape == of_masks.shape == (2, 12, 3) and math.isfinite(together.sum())
    for r in range(3):
        rows = slice(4 * r, 4 * r + 4)
        one = slice(r, r + 1)
        torch.testing.assert_close(together[:, rows], pool(features, (5, 7), boxes=boxes[:, one], grid_size=2))
        torch.testing.assert_close(of_masks[:, rows], pool(features, (5, 7), masks=masks[:, one], grid_size=2))
    sizes = []
    weights_of_boxes = PoolAggregator.weights_of_boxes

    def counting(self, boxes, *arguments):
        sizes.append(boxes.shape[1])
        return weights_of_boxes(self, boxes, *arguments)

    monkeypatch.setattr(PoolAggregator, "weights_of_boxes", counting)
    monkeypatch.setattr(pooling_mmgem, "MAX_WEIGHTS", 2 * 2 * 35 * 4)
    assert torch.equal(pool(features, (5, 7), boxes=boxes, grid_size=2), together) and sizes == [2, 1]
    assert torch.equal(pool(features, (5, 7), masks=masks, grid_size=2), of_masks)


def test_a_region_is_a_box_or_a_mask():
    boxes, masks = torch.tensor([[[0.0, 0, 20, 20]]]), torch.ones(1, 1, 40, 56)
    with pytest.raises(ValueError, match="not both"):
        PoolAggregator(PATCH)(features_map(), (5, 7), boxes=boxes, masks=masks)


@pytest.mark.parametrize("patch, side", [(14, 384), (16, 224), (14, 30), (7, 49)])
def test_the_whole_image_is_the_mean_whatever_its_size(patch, side):
    """siglip-so400m-384 has 27 patches of 14 pixels, and 6 pixels that it does not see."""
    cells = side // patch
    features = features_map(cells, cells, dtype=torch.float32)
    pool = PoolAggregator(patch)
    whole = torch.tensor([[[0.0, 0.0, side, side]]])
    weights = pool(torch.eye(cells**2)[None], (cells, cells), boxes=whole)
    assert (weights == weights[0, 0, 0]).all(), "of all patches alike, to the last bit"
    torch.testing.assert_close(pool(features, (cells, cells), boxes=whole)[:, 0], features.mean(1))
    for k in (1, 3):
        mask = torch.ones(1, 1, side, side, dtype=torch.bool)
        bins = pool(features, (cells, cells), masks=mask, grid_size=k)
        torch.testing.assert_close(bins.mean(1), features.mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_a_region_behind_the_last_whole_patch_is_the_patch_at_its_edge(k):
    features = features_map(2, 3)
    pool = PoolAggregator(PATCH)
    mask = torch.zeros(1, 1, 20, 30, dtype=torch.bool)
    mask[..., 2:5, 25:30] = True
    box = torch.tensor([[[25.0, 2.0, 30.0, 5.0]]], dtype=torch.float64)
    expected = features[:, 2:3].expand(1, k * k, 3)
    torch.testing.assert_close(pool(features, (2, 3), masks=mask, grid_size=k), expected)
    inside = features.clone()
    inside[:, 3:] = inside[:, :3]  # the box is less than half a cell from the first row's centres alone
    torch.testing.assert_close(pool(inside, (2, 3), boxes=box, grid_size=k), expected)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_masks_with_impossible_weights_are_refused(weight):
    masks = torch.zeros(1, 1, 40, 56)
    masks[..., :8, :8] = 1
    masks[..., 3, 3] = weight
    with pytest.raises(ValueError, match="negative, infinite or NaN weight"):
        PoolAggregator(PATCH)(features_map(), (5, 7), masks=masks)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_negative_integers_are_no_weights(dtype):
    masks = torch.ones(1, 1, 5 * PATCH, 7 * PATCH, dtype=dtype)
    pool, features = PoolAggregator(PATCH), features_map(dtype=torch.float32)
    assert torch.allclose(pool(features, (5, 7), masks=masks), features.mean(1, keepdim=True), atol=1e-6)
    masks[0, 0, 0, 0] = -1
    with pytest.raises(ValueError, match="negative, infinite or NaN weight"):
        pool(features, (5, 7), masks=masks)


@pytest.mark.parametrize("shape", [(1, 1, 80, 56), (1, 1, 40, 64), (1, 40, 56), (1, 1, 1, 40, 56)])
def test_masks_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"masks have the shape .* must be \(images, regions, 40, 56\)"):
        PoolAggregator(PATCH)(features_map(), (5, 7), masks=torch.ones(shape, dtype=torch.bool))
