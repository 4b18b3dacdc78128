"""The routing picture and its figure, by hand."""

import numpy as np

from moe_jax.instruments.picture import mutual_information, routing


def test_mutual_information_by_hand():
    """Two domains: an expert for each says 1 bit, even use says nothing."""
    assert mutual_information(np.array([[10.0, 0.0], [0.0, 30.0]])) == 1.0
    assert mutual_information(np.array([[5.0, 5.0], [7.0, 7.0]])) == 0.0
    assert mutual_information(np.array([[5.0, 5.0], [0.0, 0.0], [7.0, 7.0]])) == 0.0  # a domain without rows
    assert mutual_information(np.zeros((2, 2))) == 0.0


def test_draws_every_layer(tmp_path):
    counts = np.random.default_rng(0).integers(0, 50, (5, 3, 8)).astype(float)
    image = routing(counts, ["drama", "verse", "novel"], tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 5_000
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10
