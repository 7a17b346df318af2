"""Where batches come from: windows with what is known of the teacher, cached or computed online."""
