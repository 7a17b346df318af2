"""Which steps run, in what order, with what settings. Computes nothing itself."""
