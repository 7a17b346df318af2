"""What a plan computes with: a sample of a corpus, small enough to rehearse on."""
