"""The averages: how fast they move, how they are stored, read and swapped in."""
