"""Where a run's model looks in a slide, and what each tile adds to its answer: pictures, a QuPath layer, a table."""
