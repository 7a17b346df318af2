"""Stage one, first half: trains the full-precision teacher."""
