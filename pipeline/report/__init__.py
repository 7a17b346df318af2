"""One page that tells the story of a run: a section per file, each a function from what is on disk."""
