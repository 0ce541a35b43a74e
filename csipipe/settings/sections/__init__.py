"""The sections of the settings, a file each: names, defaults, units, and checks of their own."""
