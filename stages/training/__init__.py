"""The one training loop that teacher and student share."""
