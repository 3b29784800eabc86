"""The picture of docs/hardware.md."""

from matplotlib.colors import to_hex

from report.axes import KEPT, SIDE, axes_figure


def test_each_panel_is_pruned_along_its_axis():
    kept = []
    for panel in axes_figure().axes:
        squares = [patch for patch in panel.patches if patch.get_width() < 1 and patch.get_height() < 1]
        assert len(squares) == SIDE**2
        kept.append({(int(p.get_y()), int(p.get_x())) for p in squares if to_hex(p.get_facecolor()) == KEPT.lower()})
    rows, columns, both = kept

    def is_2of4(places, dim):
        groups = [(place[1 - dim], place[dim] // 4) for place in places]
        return len(places) == SIDE**2 / 2 and all(groups.count(group) == 2 for group in groups)

    assert [is_2of4(rows, 1), is_2of4(rows, 0)] == [True, False] == [is_2of4(columns, 0), is_2of4(columns, 1)]
    assert is_2of4(both, 0) and is_2of4(both, 1)
