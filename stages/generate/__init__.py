"""Text from one model, as it is written."""
