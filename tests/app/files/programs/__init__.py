"""Archives of exported programs, and the script that made them."""
