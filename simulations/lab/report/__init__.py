"""What people look at of runs: tables, curves, figures, a page, and several runs side by side."""
