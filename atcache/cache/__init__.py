"""An opened cache: what it says of itself, and its maps as lazy arrays."""
