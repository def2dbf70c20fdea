"""What an average is: how fast it moves, how it is stored, read and swapped in."""
