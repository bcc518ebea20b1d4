"""Worker processes that take analyses from the queue and compute them."""
