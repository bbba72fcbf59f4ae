"""Reports for people: `to_html` and `fit_to_html` make pages, `terminal` and `to_terminal` tables; `compared`
joins several results to one report."""

from onecard.render.fit import compared, fit_report, fit_to_html
from onecard.render.page import terminal, to_html, to_terminal

__all__ = ["compared", "fit_report", "fit_to_html", "terminal", "to_html", "to_terminal"]
