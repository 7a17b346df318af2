"""Stage one, second half: writes what the teacher knows into a cache."""
