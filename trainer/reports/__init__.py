"""Reports: what a run left in its folder, as tables, pictures and one page."""
