"""The order of the neurons in reports, against numbers computed by hand."""

import numpy as np
import pytest
from scipy import stats

from dass.errors import DassError
from report.kinds import KINDS
from report.orders import gain, order_frame, variances
from report.page import View, gained, released, varied
from report.reading import runs_of
from report.tables import cells_of, find, paired_difference
from tests.report.records import identify, losses, make_record
from tests.report.test_kinds import drawn, material, rows_of

SHIFTS = {"w": [0.30, 0.36, 0.27], "d": [0.21, 0.19, 0.29]}  # of random orders


def in_order(run_id, method, shift, order="released", order_seed=0, noise=0.0, **options):
    """A record of a run in an order; its determinants say so, as real ones do."""
    options |= {"order": order, "order_seed": order_seed}
    record = make_record(run_id, method, losses(shift, noise), **options)
    record["config"]["method"]["axis"] = {"gate": "in"}
    part = {"name": "random", "seed": order_seed, "code": "c"} if order == "random" else None
    record = identify(record)
    record["determinants"]["method"] = {"name": method, "order": part}
    return record


def all_orders():
    for name, method in (("w", "wanda"), ("d", "dass")):
        options = {"alpha": 1.0} if method == "dass" else {}
        yield in_order(name, method, 0.3, **options)
        for seed, shift in enumerate(SHIFTS[name]):
            yield in_order(f"{name}{seed}", method, shift, "random", seed, noise=0.01 * seed, **options)
        yield in_order(f"{name}s", method, 0.15, "spread", noise=0.02, **options)
        yield in_order(f"{name}c1", method, 0.37 if name == "w" else 0.31, seed=1, **options)
        yield in_order(f"{name}c2", method, 0.33 if name == "w" else 0.24, seed=2, **options)


def test_random_orders_are_draws_of_one_row_and_a_chosen_order_is_a_row_of_its_own():
    cells = cells_of(runs_of(list(all_orders())))
    assert list(cells.label) == ["wanda", "wanda (order=spread)", "dass", "dass (order=spread)"]
    assert list(cells.n_draws) == [6, 1, 6, 1]
    assert find(cells, "2:4", "dass", {"alpha": 1.0}).label == "dass"
    assert find(cells, "2:4", "dass", {"alpha": 1.0, "order": "spread"}).label == "dass (order=spread)"


def test_the_gain_of_a_chosen_order_is_over_the_mean_of_the_random_ones():
    row = next(order_frame(cells_of(runs_of(list(all_orders())))).itertuples())
    assert [run.id for run in row.random] == ["w0", "w1", "w2"] and [run.id for run in row.released] == ["w"]
    found = gain(row, "spread")
    random = np.array([losses(shift, 0.01 * seed) for seed, shift in enumerate(SHIFTS["w"])])
    spread = losses(0.15, 0.02)
    of_windows = (spread - random.mean(axis=0)).var(ddof=1) / 16
    of_orders = random.mean(axis=1).var(ddof=1) / 3
    assert found.mean == pytest.approx(spread.mean() - random.mean())
    of_one_more = of_orders * (3 + 1)
    assert found.stderr == pytest.approx(np.sqrt(of_windows + of_one_more))
    assert found.freedom == pytest.approx(2 * (of_windows + of_one_more) ** 2 / of_one_more**2)
    assert found.counts == (abs(found.mean) > max(2, stats.t.ppf(0.975, found.freedom)) * found.stderr)
    assert gain(row, "matched") is None


def test_the_variance_of_a_difference_by_its_source():
    by_order, by_draw = np.array([[1.0, 3.0], [2.0, 6.0]]), np.array([[0.0, 1.0]])
    found = variances(by_order, by_draw)
    assert found["order"] == (2.0, 2) and found["windows"] == (4.5 / 2, 2)
    assert np.isnan(found["calibration"][0])


def test_the_tables_and_the_figure_of_orders():
    report = KINDS["order"](material(*all_orders()))
    table = rows_of(report.grids[0], "Released", "Random", "Spread", "Matched", "Δ matched")
    values = np.exp([losses(shift, 0.01 * seed).mean() for seed, shift in enumerate(SHIFTS["w"])])
    random = f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (3)"
    assert table["2:4", "wanda"][:3] == [
        f"{np.exp(losses(0.3).mean()):.2f}",
        random,
        f"{np.exp(losses(0.15, 0.02).mean()):.2f}",
    ]
    assert table["2:4", "wanda"][3:] == ["—", "—"]
    shares = rows_of(report.grids[1], "sd, order", "sd, calibration", "Share, order", "Share, calibration")
    order = np.std(
        [
            losses(d, 0.01 * i).mean() - losses(w, 0.01 * i).mean()
            for i, (d, w) in enumerate(zip(SHIFTS["d"], SHIFTS["w"], strict=True))
        ],
        ddof=1,
    )
    draw = np.std([0.0, 0.31 - 0.37, 0.24 - 0.33], ddof=1)
    assert shares["2:4", "dass"][:2] == [f"{order:.4f} (3)", f"{draw:.4f} (3)"]
    total = (
        order**2
        + draw**2
        + variances(np.array([losses(d) - losses(w) for d, w in zip(*SHIFTS.values(), strict=True)]), np.zeros((1, 1)))[
            "windows"
        ][0]
    )
    assert float(shares["2:4", "dass"][2].rstrip("%")) == pytest.approx(100 * order**2 / total, abs=1)
    (axes,) = drawn(report).axes
    usual = np.mean([losses(shift, 0.01 * seed).mean() for seed, shift in enumerate(SHIFTS["w"])])
    points = sorted(y for line in axes.containers for y in line.lines[0].get_ydata())
    assert any(point == pytest.approx(losses(0.15, 0.02).mean() - usual) for point in points) and len(points) == 10


def test_unstructured_rows_and_rows_without_orders_have_no_order():
    records = [make_record("w", "wanda", losses(0), "50%"), make_record("d", "dass", losses(0.1), "50%")]
    report = KINDS["order"](material(*records))
    assert not report.grids and report.draw is None


def test_the_figure_over_size_has_the_models_by_their_parameters():
    records = []
    for model, parameters in (("large", 8 * 10**8), ("small", 10**8)):
        for name, shift in (("wanda", 0.0), ("dass", 0.1 if model == "small" else 0.4)):
            record = make_record(f"{model}-{name}", name, losses(shift, 0.01 * len(name)), model=model)
            record["sparsity"]["parameters"] = parameters
            records.append(record)
    (axes,) = drawn(KINDS["scale"](material(*records))).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["small\n0.10 B", "large\n0.80 B"]
    assert list(axes.containers[0].lines[0].get_ydata()) == pytest.approx([0.1, 0.4], abs=0.01)


def test_draws_of_the_calibration_set_in_one_order_count_as_one_order():
    """Released with three seeds and random with one: two orders, and the mean is of both alike."""
    shifts = {"released": (0.10, 0.14, 0.12), "random": (0.30,)}
    runs = {}
    for method in ("wanda", "dass"):
        records = []
        for order, own in shifts.items():
            for seed, shift in enumerate(own):
                moved = 0.0 if method == "wanda" else shift
                records.append(in_order(f"{method}{order}{seed}", method, moved, order, 0, seed=seed))
        runs[method] = runs_of(records)
    found = paired_difference(runs["dass"], runs["wanda"])
    assert found.mean == pytest.approx((0.12 + 0.30) / 2)
    assert found.stderr == pytest.approx(np.std([0.12, 0.30], ddof=1) / np.sqrt(2)) and found.freedom == pytest.approx(
        1
    )


def test_a_chosen_order_that_is_one_more_random_one_seldom_counts():
    draws, told = np.random.default_rng(0), 0
    for _ in range(200):
        runs = [
            in_order(f"r{i}", "wanda", draws.normal(0, 0.05), "random" if i else "spread", i, noise=0.01 * i)
            for i in range(4)
        ]
        told += gain(next(order_frame(cells_of(runs_of(runs))).itertuples()), "spread").counts
    assert told / 200 < 0.09


def test_a_page_asks_for_one_order_alone_and_for_what_a_chosen_one_gains():
    view = View(cells_of(runs_of(list(all_orders()))))
    found = released(view, "dass", "2:4")
    assert found.mean == pytest.approx((0.30 + 0.31 + 0.24 - 0.30 - 0.37 - 0.33) / 3)  # of three calibration sets
    row = next(order_frame(view.cells).itertuples())
    assert gained(view, "spread", "wanda", "2:4") == gain(row, "spread")
    with pytest.raises(DassError, match="order=matched changes for dass at 2:4, which was not run"):
        gained(view, "matched", "dass", "2:4", alpha=1.0)
    with pytest.raises(DassError, match="asks what order=spread changes for magnitude"):
        gained(view, "spread", "magnitude", "2:4")
    share = varied(view, "dass", "2:4")
    assert sum(share.values()) == pytest.approx(1)
    assert (
        f"{share['order']:.0%}"
        == rows_of(KINDS["order"](material(*all_orders())).grids[1], "Share, order")["2:4", "dass"][0]
    )
    for method in ("wanda", "magnitude"):
        with pytest.raises(DassError, match=f"what the variance of {method} at .:. is made of"):
            varied(view, method, "4:8" if method == "wanda" else "2:4")
    alone = [in_order("r", "dass", 0.3, "random", 0), in_order("w", "wanda", 0.3)]
    with pytest.raises(DassError, match="dass at 2:4 in the released order, in which it was not run"):
        released(View(cells_of(runs_of(alone))), "dass", "2:4")
