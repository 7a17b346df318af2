"""Ternary students as they are deployed: weights stay packed in memory, four to a byte."""
