"""Loss terms on distributions and hidden states, each exact on partial targets."""
