"""Many students from one cache: what is varied, who trains what, and what came out."""
