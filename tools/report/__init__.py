"""What writes pages of docs/ from figures and tests.

Each runs from the project's folder, as `python -m tools.report.quality` does.
The text of a page is in a template beside its program, `*.md`.
"""
