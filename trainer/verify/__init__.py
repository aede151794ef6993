"""`slidegrad verify`: gradients of ranks, virtual ranks and groups held against one process."""
