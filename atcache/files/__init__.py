"""Where bytes lie, here or on a server: locations, reading at any place, and writing whole files or none."""
