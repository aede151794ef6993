"""Loading: which regions a rank will need, read ahead on threads, within a budget of memory."""
