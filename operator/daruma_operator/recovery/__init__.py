"""How lost state comes back, and what that costs. Pure: no I/O, no clock."""
