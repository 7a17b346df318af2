"""A student as it is deployed: how large it is on disk, and how fast it runs beside its teacher."""
