"""The HTML page of runs: its figures by hand, and the page itself in a browser."""

import json
import os
import re
import shutil

import jax
import numpy as np
import page_cases
import pytest

from moe_jax import __main__, config, train
from moe_jax.config import config_file
from moe_jax.instruments.page import collect, page, routing
from moe_jax.parallel import mesh

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TINY = {
    "mesh.data": 1,
    "model.d_model": 16,
    "model.num_kv_heads": 2,
    "model.repeats": 2,
    "model.moe.num_experts": 4,
    "model.moe.expert_hidden": 16,
    "data.sources": (("embedded:verse", 1.0), ("embedded:novel", 1.0)),
    "data.slice_bytes": 20_000,
    "data.heldout_bytes": 2_000,
    "data.seq_len": 32,
    "train.batch_size": 4,
    "train.steps": 2,
    "eval.every": 0,
    "eval.final_batches": 1,
    "eval.sample_tokens": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "log.every": 1,
    "log.tensorboard": False,
}


# Figures by hand


def by_hand():
    """Four tokens, two layers, three experts: expert 2 is dead, and one assignment is nowhere."""
    expert = np.array([[[0, 1], [0, 1], [1, 0], [1, 3]], [[1, 0], [1, 0], [0, 1], [0, 1]]])
    gate = np.array([[[0.9, 0.1]] * 4, [[0.2, 0.8]] * 4])
    dropped = np.zeros(expert.shape, bool)
    dropped[0, 0, 0] = True
    token = np.array([5, 5, 6, 6])
    zero = np.zeros(4, int)
    return routing.Record(expert, gate, dropped, token, np.arange(4), zero, zero, 3)


def test_choices_are_in_the_order_of_gates():
    record = routing.in_order(by_hand())
    # In layer 1 the second place has the larger gate.
    assert record.expert[1].tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert record.expert[0, 3].tolist() == [1, 3]


def test_load_drops_and_dead_experts():
    record = routing.in_order(by_hand())
    load = routing.load(routing.chosen(record))
    # Layer 0: three and four of seven assignments; the mean of three experts is 7 / 3.
    np.testing.assert_allclose(load[0], [3 / (7 / 3), 4 / (7 / 3), 0])
    assert routing.dead(load) == [(0, 2), (1, 2)]
    np.testing.assert_allclose(routing.drops(record)[0], [1 / 3, 0, 0])


def test_coactivation_saturation_and_transitions():
    record = routing.in_order(by_hand())
    chosen = routing.chosen(record)
    share = routing.coactivation(chosen)
    # Of the four tokens of expert 1 three go to expert 0, of whose three all go to expert 1.
    assert share[0, 1, 0] == 0.75 and share[0, 0, 1] == 1 and share[0, 0, 0] == 0
    assert routing.saturation(chosen, chosen).tolist() == [1, 1]
    # Layer 0 has seven assignments, of which the other has all; layer 1 has eight: seven are kept.
    assert routing.saturation(chosen[::-1], chosen).tolist() == [1, 7 / 8]
    np.testing.assert_array_equal(routing.transitions(record)[0, :2, :2], np.eye(2))
    paths = routing.paths(record)
    assert paths == [([0, 0], 0.5, 0.25), ([1, 1], 0.5, 0.25)]


def test_information_is_that_of_first_choices():
    record = routing.in_order(by_hand())
    found = routing.information(record, record.token)
    np.testing.assert_allclose(found.bits, [1, 1])
    assert (found.chance < 0.9).all()
    assert routing.information(record, record.domain).bits.tolist() == [0, 0]


def test_typical_tokens_are_those_that_an_expert_gets():
    record = page_cases.record(num_tokens=2000)
    for layer in routing.typical(record):
        for expert, tokens in enumerate(layer[:-1]):
            # page_cases sends byte b to expert 5 b mod 7.
            assert tokens and all(token * 5 % 7 == expert for token, _, _ in tokens[:2])
        assert layer[-1] == []


def test_experts_of_two_seeds_are_matched():
    first = page_cases.record(num_tokens=2000)
    other = page_cases.record(num_tokens=2000, seed=3, shift=3)
    found = routing.match(first, other)
    # Expert e of the first is e + 3 mod 7 of the other; the dead ones are left for each other.
    want = [(expert + 3) % 7 for expert in range(7)] + [7]
    assert found.partner.tolist() == [want] * 3
    assert (found.agreement > 0.75).all() and (found.chance < 0.35).all()


# The page


def written(path, *runs):
    pytest.importorskip("vl_convert", reason="the extra [report] is not installed")
    page.write(path, runs)
    return path


def test_the_page_has_all_and_is_small(tmp_path):
    big = page_cases.collected(
        "big", num_layers=8, num_experts=64, num_tokens=6000, steps=tuple(range(8))
    )
    text = written(tmp_path / "big.html", big, page_cases.collected("other")).read_text()
    assert len(text.encode()) < 5e6
    assert not re.search(r'(src|href)="(?!#|data:)', text.split("<script>")[0])
    # The text has "</script>" in it, which must not end the element that it stands in.
    assert text.count("</script>") == 3
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [run["name"] for run in data["runs"]] == ["big", "other"]
    assert data["matches"]["notes"] == [
        "big and other are not matched: they have other numbers of layers or experts"
    ]


def browser():
    """The browser of this machine. Skips, with the reason, where there is none."""
    found = os.environ.get("MOE_JAX_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), "")
    if not found:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}, or its path in MOE_JAX_BROWSER)")
    return found


def test_the_page_in_a_browser(tmp_path):
    """Every chart is drawn, nothing is fetched, and what can be clicked does something."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = browser()
    path = written(
        tmp_path / "two.html",
        page_cases.collected("first"),
        page_cases.collected("second", seed=5, shift=3),
    )
    said, fetched = [], []
    with sync_api.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = opened.new_page(viewport={"width": 1400, "height": 900})
        tab.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else 0)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("body[data-drawn]", timeout=30_000)
        assert said == [] and tab.locator(".error").count() == 0
        assert [url for url in fetched if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
        charts = tab.locator("canvas")
        assert charts.count() == int(tab.evaluate("document.body.dataset.drawn")) > 20
        sizes = charts.evaluate_all("all => all.map(one => one.width * one.height)")
        assert min(sizes) > 10_000

        # A chart of one layer shows another layer when it is chosen.
        card = tab.locator(".card", has_text="Co-activation").first
        before = card.locator("canvas").screenshot()
        card.locator("select").select_option("0")
        tab.wait_for_timeout(300)
        assert card.locator("canvas").screenshot() != before

        # The pointer on a token shows its expert, its gate and the second choice.
        tab.locator(".tokens span").nth(4).hover()
        tip = tab.locator("#tip").inner_text()
        assert re.search(r'"q", layer 0\n1\. expert \d, gate [\d.]+\n2\. expert \d, gate', tip)
        # A click on an expert leaves its tokens alone; another click brings all back.
        text = tab.locator(".text").first
        text.locator(".key span").first.click()
        faded = text.locator(".tokens .faded").count()
        assert 0 < faded < text.locator(".tokens span").count()
        text.locator(".key span.chosen").click()
        assert text.locator(".tokens .faded").count() == 0
        # Another layer of the table of typical tokens.
        table = tab.locator(".typical").first
        first_layer = table.locator("table").inner_text()
        table.locator("select").select_option("2")
        assert table.locator("table").inner_text() != first_layer
        assert "no frequent token" in first_layer
        opened.close()


def test_the_command_reads_a_run(tmp_path, capsys):
    """Of a run as training leaves it: both checkpoints, the held-out rows, its text."""
    pytest.importorskip("vl_convert", reason="the extra [report] is not installed")
    workdir, out = tmp_path / "run", tmp_path / "page.html"
    raw = config_file.read(config_file.SHIPPED / "base.py", TINY)
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        train.run(config.build(raw, 1), raw, workdir, 0.0)
    flags = ["report", "--workdir", str(workdir), "--out", str(out), "--batches", "1"]
    assert __main__.main(flags) == 0
    data = json.loads(out.read_text().split('id="data">')[1].split("</script>")[0])
    (run,) = data["runs"]
    titles = [chart["title"] for chart in run["charts"]]
    assert "Load of every expert, layer by layer" in titles and "Co-activation" in titles
    assert any(title.startswith("Saturation") for title in titles)
    assert {shown["domain"] for shown in run["text"]} == {"verse", "novel"}
    said = capsys.readouterr().out
    assert "probe --workdir" in said and "written:" in said
    # What is wrong is one line.
    for wrong, message in (
        (["--workdir", str(tmp_path), "--out", "x.html"], "holds no run"),
        (["--workdir", str(workdir), "--out", "x.txt"], "ends in .html"),
        (["--workdir", str(workdir), "--out", "x.html", "--steps", "0"], "--steps 0 must be"),
    ):
        assert __main__.main(["report", *wrong]) == 64
        assert message in capsys.readouterr().err


def test_checkpoints_are_spread_evenly():
    assert collect.spread([1, 2, 3], 8) == [1, 2, 3]
    assert collect.spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert len(collect.thinned(list(range(1000)))) <= collect.MOST_POINTS + 1
    assert collect.thinned(list(range(1000)))[-1] == 999
