"""One page that shows a run: `pynas report RUN`, `pynas.report(run)`.

To add a section: a function that takes `told.Told` (what the run's folder holds) and returns a part, that is one of the
classes of `parts`: a `Picture` (a figure at two widths, words for those who do not see it, and its numbers), a
`Listing`, `Words` or `Code`; and its line in `sections.SECTIONS`. Where the run has no data for it, it raises `Absent`
with the reason, which the page shows at its end. Figures come from `pynas.plots`, drawn in colours that
`pynas.plots.style.DARK` has a counterpart for; text goes through the template, which escapes it, and nothing may be
loaded from elsewhere. The contract test (tests/test_report.py) opens reports of all strategies.
"""
