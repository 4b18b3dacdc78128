"""The pictures of routing and knock-out, and the figures in them, by hand."""

import re

import numpy as np
import pytest

from moe_jax.instruments import bootstrap, knockout, picture, picture_page
from moe_jax.instruments.information import ceiling, chance, mutual_information, origin


def test_mutual_information_by_hand():
    """Two domains: an expert for each says 1 bit, even use says nothing."""
    assert mutual_information(np.array([[10.0, 0.0], [0.0, 30.0]])) == 1.0
    assert mutual_information(np.array([[5.0, 5.0], [7.0, 7.0]])) == 0.0
    assert (
        mutual_information(np.array([[5.0, 5.0], [0.0, 0.0], [7.0, 7.0]])) == 0.0
    )  # a domain without rows
    assert mutual_information(np.zeros((2, 2))) == 0.0
    for n in (2, 3, 5, 8):
        assert mutual_information(7 * np.eye(n)) == pytest.approx(np.log2(n))
        assert ceiling(7 * np.eye(n)) == pytest.approx(np.log2(n))
    # p(e | z) = (3/4, 1/4) and (1/4, 3/4): 1 - H(1/4) = 1 - 0.811278; sizes of domains do not count
    assert mutual_information(np.array([[3.0, 1.0], [100.0, 300.0]])) == pytest.approx(
        0.1887219, abs=1e-6
    )


def test_the_ceiling_is_the_smaller_entropy():
    assert ceiling(np.ones((4, 2))) == pytest.approx(
        1
    )  # two experts tell at most 1 bit of four domains
    assert ceiling(np.ones((2, 4))) == pytest.approx(1)  # and two domains have but 1 bit to be told
    assert (
        ceiling(np.array([[3.0, 1.0]])) == 0 == ceiling(np.array([[3.0], [1.0]]))
    )  # one domain, or one expert
    # three domains, of which one has no tokens, and loads of 3/4 and 1/4
    assert ceiling(np.array([[3.0, 1.0], [0.0, 0.0], [3.0, 1.0]])) == pytest.approx(
        0.8112781, abs=1e-6
    )


def rows(num_rows, tilt, seed=0):
    """(assignments [R, 1, 4], domains): in each row its own shares of the experts, moved by its
    domain.
    """
    rng = np.random.default_rng(seed)
    domain_R = np.arange(num_rows) % 3
    logits_RE = rng.normal(size=(num_rows, 4)) + tilt * np.eye(4)[domain_R]
    share_RE = np.exp(logits_RE) / np.exp(logits_RE).sum(1, keepdims=True)
    return 100 * share_RE[:, None], domain_R


def by_domain(experts_RLE, domain_R, num_domains=3):
    return np.stack([experts_RLE[domain_R == z].sum(0) for z in range(num_domains)], 1)


def test_chance_is_what_rows_alone_give():
    """Domains that do not matter stay below it 19 times of 20, domains that do are above; fewer
    rows give more by chance.
    """
    below = 0
    for seed in range(40):
        experts_RLE, domain_R = rows(30, tilt=0, seed=seed)
        bits_L = mutual_information(by_domain(experts_RLE, domain_R))
        below += bits_L[0] <= chance(experts_RLE, domain_R, 3, seed=0)[0]
    assert 34 <= below <= 40
    experts_RLE, domain_R = rows(30, tilt=3)
    limit_L = chance(experts_RLE, domain_R, 3, seed=0)
    assert mutual_information(by_domain(experts_RLE, domain_R))[0] > 2 * limit_L[0]
    np.testing.assert_array_equal(limit_L, chance(experts_RLE, domain_R, 3, seed=0))
    assert chance(*rows(300, tilt=0), 3, seed=0)[0] < 0.3 * chance(*rows(30, tilt=0), 3, seed=0)[0]
    # rows that fill up a batch have no assignments, and change nothing
    more = (
        np.concatenate([experts_RLE, np.zeros((9, 1, 4))]),
        np.concatenate([domain_R, np.zeros(9, int)]),
    )
    np.testing.assert_array_equal(limit_L, chance(*more, 3, seed=0))


def test_where_the_tokens_of_an_expert_come_from():
    """Expert 0: half of domain 0 and a quarter of domain 1; neither the load nor the size of a
    domain counts.
    """
    counts = np.array([[10.0, 10.0, 0.0], [100.0, 300.0, 0.0], [0.0, 0.0, 0.0]])
    want = np.array([[2 / 3, 0.4, np.nan], [1 / 3, 0.6, np.nan], [np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(origin(counts), want)


def test_an_interval_covers_what_is_known():
    """Of rows whose ratio is known to be 0.5 the interval has it 19 times of 20, with 4 rows and
    with 40; so has the mean's.
    """
    for num_rows in (4, 40):
        rng, domain_R = np.random.default_rng(num_rows), np.repeat([0, 1], num_rows)
        size_R = rng.uniform(80, 120, 2 * num_rows)
        sum_FR = 0.5 * size_R + rng.normal(size=(400, 2 * num_rows)) * 5  # 400 figures at once
        for found in bootstrap.ratios(sum_FR, size_R, domain_R, 2, seed=0):
            covered = ((found.low < 0.5) & (found.high > 0.5)).mean()
            assert 0.91 < covered < 0.985, (num_rows, covered)


def test_an_interval_by_hand():
    """Rows of one size: the interval is Student's, mean +- t s / sqrt(n), up to the 1000 draws.

    1, 2, 4: t(2) = 4.302653, s^2 = 7/3.
    """
    sum_R, domain_R = np.array([1.0, 2.0, 4.0, 8.0, 0.0]), np.array([0, 0, 0, 2, 1])
    each, mean = bootstrap.ratios(sum_R, np.array([1.0, 1, 1, 1, 0]), domain_R, 3, seed=0)
    assert each.high[0] - 7 / 3 == pytest.approx(4.302653 * np.sqrt(7 / 9), rel=0.1)
    assert each.high[0] - 7 / 3 == pytest.approx(7 / 3 - each.low[0])
    assert np.isnan(each.low[1]) and np.isnan(each.low[2])  # no row, and a single one
    assert np.isnan(mean.low)
    again = bootstrap.ratios(sum_R, np.array([1.0, 1, 1, 1, 0]), domain_R, 3, seed=0)
    other = bootstrap.ratios(sum_R, np.array([1.0, 1, 1, 1, 0]), domain_R, 3, seed=1)
    assert each.low[0] == again[0].low[0] != other[0].low[0]


def drawn_rows(layers, num_domains, num_experts, num_rows=24):
    rng = np.random.default_rng(0)
    domain_R = np.arange(num_rows) % num_domains
    experts_RLE = rng.integers(0, 50, (num_rows, layers, num_experts)).astype(float)
    experts_RLE[:, 0, 0] = 0  # an expert without tokens
    if num_domains > 2:
        experts_RLE[domain_R == 1] = 0  # and a domain
    return by_domain(experts_RLE, domain_R, num_domains), experts_RLE, domain_R


@pytest.mark.parametrize(
    ("layers", "num_domains", "num_experts"),
    [(1, 1, 2), (1, 2, 2), (5, 3, 8), (2, 20, 64), (9, 6, 17)],
)
def test_draws_every_layer_whatever_the_sizes(tmp_path, layers, num_domains, num_experts):
    names = [f"a_domain_with_a_name_that_is_rather_long_{z}" for z in range(num_domains)]
    image = picture.routing(
        *drawn_rows(layers, num_domains, num_experts), names, tmp_path / "routing.png"
    )
    assert (tmp_path / "routing.png").stat().st_size > 5_000
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10
    assert (
        image.shape[1] <= picture_page.DPI * (picture_page.WIDEST + 1)
        and max(image.shape) / min(image.shape[:2]) < 3
    )


def test_everything_in_the_picture_has_its_place(tmp_path, monkeypatch):
    """No text of the page is cut by its edge, none lies on another one, and what a number means is
    said.
    """
    pages = []
    monkeypatch.setattr(picture_page.Page, "save", lambda page, path: pages.append(page))
    names = [f"domain_{z}_of_a_corpus" for z in range(6)]
    picture.routing(*drawn_rows(4, 6, 8), names, tmp_path / "routing.png")
    picture.knockout(worth(4, 8, 6), names, "removed", tmp_path / "knockout.png")
    for page in pages:
        page.figure.draw_without_rendering()
        edge = page.figure.bbox
        boxes = [text.get_window_extent() for text in texts(page.figure)]
        assert all(
            edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0 and b.y1 <= edge.y1
            for b in boxes
        )
        wide = [box.shrunk(0.9, 0.7) for box in boxes]
        assert not any(a.overlaps(b) for i, a in enumerate(wide) for b in wide[i + 1 :])
    words = " ".join(text.get_text() for text in texts(pages[0].figure))
    assert "mutual information, in bits" in words
    assert re.search(
        r"0\.\d{3} bits, \d+\.\d % of the 2\.\d\d that are possible; chance: 0\.\d+", words
    )


def texts(figure):
    """All that is drawn: not the ticks that matplotlib keeps beyond the limits of an axis."""
    found = list(figure.texts)
    for ax in figure.axes:
        found += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [
                label
                for tick in ticks
                for label in (tick.label1, tick.label2)
                if label.get_visible()
            ]
    return [text for text in found if text.get_text()]


def worth(layers, num_experts, num_domains):
    rng = np.random.default_rng(0)
    change_LEZ = rng.normal(size=(layers, num_experts, num_domains))
    change_LEZ[:, :, 1] = np.nan  # a domain without rows
    base_Z = np.where(np.arange(num_domains) == 1, np.nan, 1)
    mean_LE, share_LEZ = np.nanmean(change_LEZ, -1), np.full(change_LEZ.shape, 1 / num_experts)
    ends = change_LEZ - 0.5, change_LEZ + 0.5
    means = mean_LE, mean_LE - 0.2, mean_LE + 0.2
    return knockout.Worth(base_Z, change_LEZ, *ends, *means, share_LEZ, share_LEZ[..., 0])


def test_draws_the_knockout_of_every_layer(tmp_path):
    picture.knockout(
        worth(5, 8, 3), ["drama", "verse", "novel"], "removed", tmp_path / "knockout.png"
    )
    assert (tmp_path / "knockout.png").stat().st_size > 5_000
    unknown = worth(1, 2, 3)  # one row of each domain: no interval is known
    nothing = {
        name: np.full_like(getattr(unknown, name), np.nan)
        for name in unknown._fields
        if "low" in name or "high" in name
    }
    picture.knockout(
        unknown._replace(**nothing), ["drama", "verse", "novel"], "around", tmp_path / "one.png"
    )
    assert (tmp_path / "one.png").stat().st_size > 5_000
