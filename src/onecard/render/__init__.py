"""Reports for people: `to_html` makes a page, `terminal` and `to_terminal` tables."""

from onecard.render.page import terminal, to_html, to_terminal

__all__ = ["terminal", "to_html", "to_terminal"]
