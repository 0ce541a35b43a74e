"""Every setting, from where it is written to where it is read."""
