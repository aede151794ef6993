"""Many runs of a recipe, over tiles per slide, precision, processes, splits and methods: one table and one page."""
