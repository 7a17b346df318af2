"""From a corpus to token windows."""
