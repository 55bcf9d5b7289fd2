"""`xelm report`: one self-contained HTML page about a RUN, and its figures as files.

`facts` reads the RUN, `verdict`, `missing`, `tables` and `pictures` say what that means, `page`
writes it down. Opens no model, needs no JAX, and writes the same bytes for the same RUN. What is
not there is said, with the command that makes it.
"""

from xelm.runs.report.page import report

__all__ = ["report"]
