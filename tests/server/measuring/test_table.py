"""Tables in Markdown."""

from server.measuring.table import Table


def test_columns_are_aligned_and_no_cell_ends_early() -> None:
    table = Table("A title", ("what", "n"), [("x|y", "1"), ("a\nlong one", "1000")])
    assert table.page().splitlines() == [
        "A title",
        "",
        "| what       |    n |",
        "| ---------- | ---: |",
        "| x/y        |    1 |",
        "| a long one | 1000 |",
    ]
