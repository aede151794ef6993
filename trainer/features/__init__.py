"""Features of a frozen encoder: computed once for a slide, kept in a store, served in the place of its tiles."""
