"""What a config will take, before anything of it is run, and how that compares with what happened."""
