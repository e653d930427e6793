"""The four files of ``--qsens-report DIR`` and ``qsens report``: one page, and the same as Markdown, JSON and CSV."""
