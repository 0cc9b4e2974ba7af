"""Windows of several sizes in a query: fine in the middle, coarse around it."""

import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel
from apm_hf.position_encoding import grid_coordinates, sample_patches


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model(**overrides):
    fields = {"image_size": 32, "patch_size": 8, "local_patch": True, "initializer_range": 0.3, "pooling": "attention"}
    torch.manual_seed(0)
    return APMModel(APMConfig.preset("tiny", **{**fields, **overrides})).eval()


def naive_window(image, centre, patch, scale):
    """`(C, patch, patch)`: the mean of every scale x scale block of the window around a pixel corner."""
    reach = patch * scale // 2
    padded = F.pad(image, (reach,) * 4)
    y, x = (place + reach for place in centre)
    window = padded[:, y - reach : y + reach, x - reach : x + reach]
    return window.unflatten(1, (patch, scale)).unflatten(3, (patch, scale)).mean(dim=(2, 4))


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_window_is_the_averaged_surroundings_zero_beyond_the_image(scale):
    image = noise(1, 3, 32, 32)
    # Corners of scale x scale blocks, one near the edge.
    for centre in ((4, 12), (16, 28), (20, 4)):
        coordinates = torch.tensor([[[2 * place / 32 - 1 for place in centre]]])
        window = sample_patches(image, coordinates, 8, scale)[0, 0].view(3, 8, 8)
        torch.testing.assert_close(window, naive_window(image[0], centre, 8, scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scales", [[1, 2], [2], [1, 2, 4], [4, 1], [1, 8], [16]])
def test_the_grid_and_its_centres_give_the_same_answers(scales):
    """Where windows begin at whole pixels the grid is a convolution, with scale 8 and 16 it is not."""
    model, images = small_model(local_patch_scales=scales, initializer_range=0.1), noise(2, 3, 32, 32)
    with torch.no_grad():
        grid, places = model(images), model(images, grid_coordinates(4, 4))
        chunked = model(images, chunk_size=3)
    for name in ("last_hidden_state", "rgb", "pooler_output"):
        assert places[name].std() > 0.01
        torch.testing.assert_close(grid[name], places[name], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(grid[name], chunked[name], atol=1e-4, rtol=1e-4)


def test_each_scale_has_its_own_weights():
    """The query is the concatenation of the windows, in the order of the scales."""
    model, images = small_model(local_patch_scales=[1, 4]), noise(1, 3, 32, 32)
    coordinates = noise(1, 5, 2).tanh()
    layer, config = model.decoder.query.patch, model.config
    assert config.local_patch_width == 2 * 3 * 64
    windows = torch.cat([sample_patches(images, coordinates, 8, scale) for scale in (1, 4)], dim=-1)
    with torch.no_grad():
        first = model(images, coordinates, output_hidden_states=True).hidden_states[0]
        blank = model(images * 0, coordinates, trigger_column=model.fold(images), output_hidden_states=True)
        query = model(images, coordinates, trigger_column=model.fold(images), output_hidden_states=True)
        torch.testing.assert_close(query.hidden_states[0], first)
    # Where both are positive, the layer's answers differ by just the windows' share.
    share = layer(windows).detach()
    both = (first > 0) & (blank.hidden_states[0] > 0)
    assert both.sum() > 20
    torch.testing.assert_close((first - blank.hidden_states[0])[both], share[both], atol=1e-4, rtol=1e-4)


def test_what_lies_around_a_location_counts_as_far_as_the_widest_window_reaches():
    near, far = small_model(local_patch_scales=[1]), small_model(local_patch_scales=[1, 2])
    images, coordinates = noise(1, 3, 32, 32), torch.tensor([[0.0, 0.0]])
    spoilt = images.clone()
    spoilt[..., 10, 10] += 10  # six pixels from the middle in either direction: outside 8 x 8, inside 16 x 16
    for model, counts in ((near, False), (far, True)):
        column = model.fold(images)
        with torch.no_grad():
            before, after = (
                model.query(column, coordinates, pixel_values=x).last_hidden_state for x in (images, spoilt)
            )
        assert (not torch.equal(before, after)) == counts
